"""NDA of one query with its default settings, five timesteps and two scales, in pairs of patches that may match per second."""

from bench.contenders import Here
from bench.figures import Goal
from bench.patches import Case, bank
from pyattr.attribution import NDA

TABLE, ROW, COLUMN = "nda", "pyattr NDA, default settings", "N=5000, 3x32x32, one query"
IMAGES, SIDE, SECONDS = 5000, 32, 20


def pairs(method: NDA) -> float:
    """Of all passes of a query over the bank."""
    return sum(Case(IMAGES, SIDE, term.patch_size, method.k, method.border, term.coarse).pairs for term in method.terms)


WORK = pairs(NDA().fit(bank(1, SIDE)))
GOALS = [Goal(TABLE, f"{COLUMN}: at most {SECONDS} s", lambda rate: rate(ROW, COLUMN), WORK / SECONDS)]


def test_nda(measure):
    images = bank(IMAGES + 1, SIDE)
    method, query = NDA().fit(images[:-1]), images[-1:]

    def check(answer):
        """Of a copy of a training image: that image stands first, and no score is negative."""
        assert answer.shape == (1, IMAGES) and (answer >= 0).all()
        small = NDA().fit(images[:20])
        assert small.scores(images[7:8]).argmax().item() == 7

    measure(
        Here(lambda: method.scores(query)),
        check=check,
        table=TABLE,
        row=ROW,
        column=COLUMN,
        ours=True,
        work=WORK,
        unit="pairs of patches that may match",
        bytes=images.numel(),
        rounds=2,
        extra={"terms": [[term.timestep, term.patch_size, term.coarse] for term in method.terms]},
    )
