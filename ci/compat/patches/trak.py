"""A TRAKer that is given no projector makes one of ours on the CPU, where it would make a BasicProjector."""

import trak.traker

from pyattr.compat.trak import Projector

trak.traker.BasicProjector = Projector
