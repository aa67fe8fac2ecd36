"""dattri's attributors, which hold random_project by name, project by ours."""

import dattri.algorithm.block_projected_if.core.compressor
import dattri.algorithm.dvemb
import dattri.algorithm.tracin
import dattri.algorithm.trak

from pyattr.compat.dattri import random_project

for module in (
    dattri.algorithm.block_projected_if.core.compressor,
    dattri.algorithm.dvemb,
    dattri.algorithm.tracin,
    dattri.algorithm.trak,
):
    module.random_project = random_project
