"""D-TRAK: TRAK with the squared norm of the predicted noise in place of the loss."""

from .trak import TRAK


class DTRAK(TRAK):
    """Which training images raise the likelihood of a query, with gradients of ``mean e_theta(x_t, t)^2``.

    ``tau(q, n) = phi_q^T (Phi^T Phi + lambda I)^{-1} phi_n`` as in :class:`TRAK`, with the feature function ``square`` on
    both sides. It is not the loss that the model was trained on, yet in the published evaluation its scores predict the loss
    of retrained models better.

    Sign: the score is bilinear in two gradients of one function, so it does not change when that function changes its sign;
    that a positive score marks a proponent is therefore taken over from :class:`TRAK`, and is what the published evaluation
    assumes and confirms. It is an empirical fact, not a derivation.

    lambda is in the units of ``Phi^T Phi``; published values for D = 32768 lie between 100 and 5000.

    Args, attributes, errors: as in :class:`TRAK`. With ``feature=Loss("interpolate", eta)`` it moves from half of TRAK's
    gradient (eta = 1/2) to its own (eta = 1).

    Source: Zheng, Pang, Du, Jiang, Lin, "Intriguing Properties of Data Attribution on Diffusion Models", ICLR 2024, section 3.
    """

    default_feature = "square"
