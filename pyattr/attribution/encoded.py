"""Encoded ensembles: members trained on splits that name each item, so that ablating it means leaving its members out."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..diffusion.progress import Progress, silent
from ..diffusion.sampling import HELD, Samples, sample
from ..diffusion.storage import differences
from ..ops import TopK, code_topk
from ..ops._arguments import check_integer
from ..ops._codes import check_codes
from .codes import ablation_weights, as_codes
from .encoded_jacobian import jacobian
from .encoded_lists import distinct_top
from .encoded_members import Mixture
from .encoded_samples import METHODS, Replay, combine, default_steps
from .encoded_training import TrainedEnsemble

_BLOCK = 1 << 14  # codes weighed at a time


class EncodedEnsemble(TrainedEnsemble):
    """Counterfactual images without retraining: an ensemble of which some members never saw an item.

    Each of N training items has an n-bit code c; member i is trained on the items with bit i set. The ensemble predicts the
    noise ``sum_i v_i f_i(x_t, t)``, v uniform. To take an item away is to sample again, with the same exogenous noise, from the
    members that did not see it: ``u_{-x} = (1 - c) / (n - h)``, h the number of ones. The derivative J of the image with
    respect to v guesses all such images at once, y + J (u_{-x} - v), and an item's influence is the norm of that change.

    Sign: a magnitude: how much the image changes when the item is taken away. There are no opponents.

    Args:
        model: builds a member, without arguments, from torch's random state; or the name of a preset of
            :func:`pyattr.diffusion.unet`.
        codes: [N] integers, see :mod:`pyattr.attribution.codes`; None: :func:`~pyattr.attribution.codes.random_codes` of
            ``num_members``, ``weight`` and ``seed`` in :meth:`fit`.
        num_members: n, in [2, 64].
        weight: h of random codes.
        schedule: of the diffusion.
        directory: where the codes and each member's checkpoints lie; None keeps the members in memory.
        seed: of random codes, and of each member's initial weights and training, which are independent of one another.
        device: where members are trained and asked; None: where the model's factory puts them, of a preset the CPU.
        training: the options of :func:`pyattr.diffusion.train`; ``steps`` at least. Of ``keep_checkpoints`` the default is 1.

    Attributes:
        codes: [N] uint64, once they are known.
        signed: False.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Dai, Gifford, "Training Data Attribution for Diffusion Models", arXiv 2306.02174.
    """

    signed = False
    _jacobian: tuple[tuple, Tensor] | None = None  # of which samples the last one was, and itself

    def sample(
        self,
        num_images: int | None = None,
        *,
        ids=None,
        weights=None,
        method: str = "published",
        steps: int | None = None,
        eta: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
        clip: bool = True,
        record: str = "noise",
        directory: str | os.PathLike | None = None,
        progress: Progress = silent,
    ) -> Samples:
        """Generate images with the weighted mean of the members' predictions.

        Args:
            weights: v, [n]; 1 / n each if None.
            method: "published" is the authors' own; see :func:`pyattr.diffusion.sample`.
            steps: None: T, or for "ddim" the smaller of T and 50.
            num_images, ids, eta, seed, batch_size, clip, record, directory, progress: see there.

        Returns:
            :class:`~pyattr.diffusion.Samples` with every slice of exogenous noise, in [-1, 1].

        Raises:
            RuntimeError: not all members are trained.
            ValueError: an argument is not as above.
        """
        members, schedule = self.members, self.recipe.schedule
        if steps is None:
            steps = default_steps(method, schedule)
        return sample(
            Mixture(members, self._weights(weights)),
            schedule,
            num_images=num_images,
            ids=ids,
            shape=self.shape,
            method=method,
            steps=steps,
            eta=eta,
            seed=seed,
            batch_size=batch_size,
            clip=clip,
            record=record,
            directory=directory,
            progress=progress,
        )

    def _weights(self, weights) -> Tensor:  # -> [n] float64
        if weights is None:
            return torch.full((self.num_members,), 1 / self.num_members, dtype=torch.float64, device="cpu")
        weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
        if weights.shape != (self.num_members,):
            raise ValueError(
                f"EncodedEnsemble: weights must have shape [{self.num_members}], got {list(weights.shape)}"
            )
        if not weights.isfinite().all():
            raise ValueError(f"EncodedEnsemble: weights must be finite, got {weights.tolist()}")
        return weights

    def counterfactual(
        self,
        samples: Samples,
        codes,
        *,
        batch_size: int = 64,
        directory: str | os.PathLike | None = None,
        progress: Progress = silent,
    ) -> Tensor:
        """The samples without an item: made again with the same noise by the members that did not see it.

        Args:
            samples: Q, of :meth:`sample`.
            codes: [M], of the items; equal ones are sampled once.
            batch_size: images that go through a member together.
            directory: batches are kept there, and an interrupted call goes on from there.
            progress: stage "counterfactual", counts steps of images.

        Returns:
            [Q, M, C, H, W] float32, in the samples' range [-1, 1]. The same call gives the same bits (on a GPU, where torch's
            deterministic algorithms are on); other batches the same images to the rounding of the networks.

        Raises:
            TypeError, ValueError: an argument is not as above, the samples are of another ensemble, or the directory was made
                otherwise.

        Extra memory: the images of distinct codes, and the members' for a batch.

        Source: Dai, Gifford 2023, section 3.
        """
        replay = self._replay(samples, batch_size, directory, progress)
        distinct, places = np.unique(as_codes(codes, self.num_members, "EncodedEnsemble"), return_inverse=True)
        images = replay.reweighted(torch.from_numpy(ablation_weights(distinct, self.num_members)), "counterfactual")
        return images[:, torch.from_numpy(places)]

    def jacobian(
        self,
        samples: Samples,
        *,
        batch_size: int = 8,
        tangents_per_pass: int = 32,
        directory: str | os.PathLike | None = None,
        progress: Progress = silent,
    ) -> Tensor:
        """The derivative of each sample with respect to the members' weights; see :mod:`pyattr.attribution.encoded_jacobian`.

        The last one is kept, so that asking again for the same samples is free.

        Args:
            samples: Q, of :meth:`sample`.
            batch_size: samples that go through a member together.
            tangents_per_pass: derivatives that go with them, at most; n are needed.
            directory: batches are kept there when they are done, and the one at work every half minute (seldomer where that
                takes long), so that an interrupted call goes on from there.
            progress: stage "jacobian", counts steps of images.

        Returns:
            J, [Q, C H W, n] float32, of pixels in [0, 1]: half the derivative of an image in [-1, 1]. Deterministic as
            :meth:`counterfactual` is.

        Raises:
            TypeError, ValueError: see :meth:`counterfactual`.

        Extra memory: the result once more where it is kept, 6 (n + 1) batches of images, and what
        :func:`pyattr.jvp.dual_forward` needs for ``batch_size`` images and their tangents.
        """
        replay = self._replay(samples, batch_size, directory, progress)
        # A copy, since what the caller writes into it must not change later answers.
        return self._kept_jacobian(replay, tangents_per_pass).clone()

    def _kept_jacobian(self, replay: Replay, tangents_per_pass: int = 32) -> Tensor:
        tangents_per_pass = check_integer("EncodedEnsemble", "tangents_per_pass", tangents_per_pass, 1, 2**31)
        key = replay.key, replay.samples.settings
        if replay.directory is None and self._jacobian is not None and self._jacobian[0] == key:
            return self._jacobian[1]
        self._jacobian = key, jacobian(replay, tangents_per_pass)
        return self._jacobian[1]

    def _derivatives(
        self, samples: Samples, *, batch_size: int = 8, directory=None, progress: Progress = silent, **options
    ) -> tuple[Tensor, Tensor]:  # -> [Q, D, n], [n]
        """The Jacobian, not to be written to, and the weights of the samples."""
        replay = self._replay(samples, batch_size, directory, progress)
        return self._kept_jacobian(replay, **options), replay.weights

    def gram(self, samples: Samples, **options) -> Tensor:
        """``J^T J`` of each sample: all that the influence of any item needs.

        Args:
            samples, options: of :meth:`jacobian`.

        Returns:
            [Q, n, n] float64, symmetric, not centred.

        Raises:
            TypeError, ValueError: see :meth:`jacobian`.

        Extra memory: the Jacobian, and that of one sample in float64.
        """
        columns, _ = self._derivatives(samples, **options)
        out = torch.empty(len(columns), self.num_members, self.num_members, dtype=torch.float64, device="cpu")
        for gram, J in zip(out, columns, strict=True):
            J = J.double()
            torch.mm(J.T, J, out=gram)
        return (out + out.mT) / 2  # a library may sum the two halves in different orders

    def approximate(
        self,
        samples: Samples,
        codes,
        method: str = "jacobian",
        *,
        batch_size: int = 8,
        directory: str | os.PathLike | None = None,
        progress: Progress = silent,
        **options,
    ) -> Tensor:
        """Guesses of :meth:`counterfactual`, at a cost that does not grow with their number.

        With y the sample and w = u_{-x} - v: "jacobian": y + J w. "members", the paper's individual models:
        y + sum_i w_i (y_i - y), where y_i is made by member i alone from the same noise. "last_step", its last step predicted
        noise: the members that saw the item are left out at the last step alone, before which the whole ensemble is at work.

        Args:
            samples: Q, of :meth:`sample`; with their trajectory, "last_step" has no steps to walk again.
            codes: [M], of the items.
            method: "jacobian", "last_step" or "members".
            batch_size, directory: see :meth:`jacobian`; what is kept serves any codes.
            progress: stage "jacobian", "last_step" or "members", counts steps of images.
            options: ``tangents_per_pass`` of "jacobian".

        Returns:
            [Q, M, C, H, W] float32, on the samples' scale, where [-1, 1] is black to white; linear guesses may leave it.

        Raises:
            TypeError, ValueError: see :meth:`counterfactual`.

        Extra memory: the Jacobian, or n images for each sample; and the guesses of one sample, twice in float64.

        Source: Dai, Gifford 2023, sections 4 and 5.3.
        """
        if method not in METHODS:
            raise ValueError(f"EncodedEnsemble: method must be one of {', '.join(METHODS)}, got {method!r}")
        if options and method != "jacobian":
            raise TypeError(f"EncodedEnsemble: {next(iter(options))} goes with the method jacobian alone")
        codes = as_codes(codes, self.num_members, "EncodedEnsemble")
        replay = self._replay(samples, batch_size, directory, progress)
        weights = torch.from_numpy(ablation_weights(codes, self.num_members))  # [M, n]
        if method == "last_step":
            return replay.last_steps(weights)
        if method == "jacobian":
            columns, scale = self._kept_jacobian(replay, **options), 2  # pixels in [0, 1] become [-1, 1]
        else:
            alone = replay.reweighted(torch.eye(self.num_members, dtype=torch.float64, device="cpu"), "members")
            columns, scale = (alone - samples.images[:, None]).flatten(2).mT, 1
        directions = scale * (weights - replay.weights)
        guesses = torch.empty(len(samples), len(codes), *samples.images.shape[1:], **HELD)
        for out, image, J in zip(guesses, samples.images, columns, strict=True):
            out.copy_((image.double().flatten() + combine(directions, J.double().T)).view(out.shape))
        return guesses

    def scores(self, queries: Samples, **options) -> Tensor:
        """The influence of every item on each sample: ``|J (u_{-x} - v)|``, in units of pixels in [0, 1].

        Args:
            queries: Q samples of :meth:`sample`; plain images do not say from what noise they were made.
            options: of :meth:`jacobian`.

        Returns:
            [Q, N] float32, none negative.

        Raises:
            TypeError, ValueError: see :meth:`jacobian`.

        Extra memory: the Jacobian, that of one sample three times in float64, and 64 MB.
        """
        columns, weights = self._derivatives(queries, **options)
        out = torch.empty(len(queries), len(self.codes), **HELD)
        for row, J in zip(out, columns, strict=True):
            J = J.double()
            spoilt = ~J.isfinite().all(0)  # [n]
            beyond = J[:, spoilt].abs().sum(0)  # NaN or inf, for each such member
            # |J w| = |R w|, and R is no larger than the Gram while it keeps twice its digits.
            R = torch.linalg.qr(torch.where(spoilt, 0, J), mode="r").R
            for start in range(0, len(self.codes), _BLOCK):
                u = torch.from_numpy(ablation_weights(self.codes[start : start + _BLOCK], self.num_members))
                # A member that takes part neither in the sample nor in the counterfactual does not count.
                absent = (u[:, spoilt] == 0) & (weights[spoilt] == 0)
                change = torch.linalg.vector_norm((u - weights) @ R.T, dim=1)
                row[start : start + _BLOCK] = change + torch.where(absent, 0, beyond).sum(1)
        return out

    def search(self, queries: Samples, k: int, *, largest: bool = True, codes=None, **options) -> TopK:
        """The k items of most influence on each sample, from a table of the n x n Gram matrix.

        Args:
            queries: Q samples of :meth:`sample`, made with uniform weights.
            k: at most N.
            largest: False: those of least influence.
            codes: other codes than the ensemble's own, [N] or a file, as :func:`pyattr.ops.code_topk` takes them.
            options: of :meth:`jacobian`.

        Returns:
            TopK of [Q, k]: influences, float64 and falling (rising where the least are asked for), and items; equal ones by
            lowest index.

        Raises:
            TypeError, ValueError: see :meth:`jacobian` and :func:`pyattr.ops.code_topk`; or the weights are not uniform.

        Extra memory: the Jacobian, and that of :func:`pyattr.ops.code_topk`.
        """
        if not torch.equal(self._made_with(queries), self._weights(None)):
            raise ValueError("EncodedEnsemble: queries must be made with uniform weights to be searched for")
        codes = torch.from_numpy(self.codes) if codes is None else codes
        # What can be refused is refused before the Jacobian, which may take hours.
        checked, _ = check_codes("EncodedEnsemble", codes)
        k = check_integer("EncodedEnsemble", "k", k, 0, len(checked.bits))
        values = torch.empty(len(queries), k, dtype=torch.float64, device="cpu")
        items = torch.empty(len(queries), k, dtype=torch.int64, device="cpu")
        for row, gram in enumerate(self.gram(queries, **options)):
            found = code_topk(gram, codes, k, largest=largest)
            values[row], items[row] = torch.as_tensor(found.values), torch.as_tensor(found.indices)
        return TopK(values, items)

    def distinct_top(self, queries: Samples, m: int, **options) -> TopK:
        """The m most influential items of each sample, among those that are in the list of no other.

        Args:
            queries: Q samples of :meth:`sample`.
            m: at least 1.
            options: of :meth:`jacobian`.

        Returns:
            TopK of [Q, m], see :func:`pyattr.attribution.encoded_lists.distinct_top`.

        Raises:
            TypeError, ValueError: see :meth:`scores`, or fewer than m items are left.

        Extra memory: that of :meth:`scores` and of :func:`pyattr.attribution.encoded_lists.distinct_top`, and the scores.
        """
        self._made_with(queries)
        m = check_integer("EncodedEnsemble", "m", m, 1, len(self.codes))
        return distinct_top(self.scores(queries, **options), m)

    def _replay(self, samples: Samples, batch_size: int, directory, progress: Progress) -> Replay:
        weights = self._made_with(samples)
        # Members are hashed once for each call, never kept from one to the next, in which they may have changed.
        asked = Mixture(self.members, weights).identity()
        differ = differences({name: samples.settings.get(name) for name in asked}, asked)
        if differ:
            raise ValueError(f"EncodedEnsemble: queries must be samples of this ensemble: {differ}")
        batch_size = check_integer("EncodedEnsemble", "batch_size", batch_size, 1, 2**62)
        directory = None if directory is None else Path(directory)
        return Replay(self.members, weights, samples, batch_size, directory, progress)

    def _made_with(self, samples: Samples) -> Tensor:  # -> [n] float64
        """The weights that samples were made with."""
        if not isinstance(samples, Samples):
            raise TypeError(
                "EncodedEnsemble: queries must be Samples of this ensemble, which hold the noise that they were made from, "
                f"got {type(samples).__name__}"
            )
        if "weights" not in samples.settings:
            raise ValueError("EncodedEnsemble: queries must be samples of this ensemble, got those of a single model")
        made, members = len(samples.settings["weights"]), len(self.members)
        if made != members:
            raise ValueError(
                f"EncodedEnsemble: queries must be samples of this ensemble: members was {made}, now {members}"
            )
        return self._weights(samples.settings["weights"])
