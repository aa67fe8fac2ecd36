"""Make the benchmark again, one stage after the other; each is skipped or goes on where it was interrupted.

python -m bench.lds draw cifar2 --data cifar2.npz
python -m bench.lds main cifar2 --work FOLDER
python -m bench.lds evaluation cifar2 --work FOLDER [--timesteps 1000]
python -m bench.lds retraining cifar2 --work FOLDER
python -m bench.lds scores cifar2 --work FOLDER
python -m bench.lds ablations cifar2 --work FOLDER
python -m bench.lds deletion cifar2 --work FOLDER
python -m bench.lds costs cifar2 --work FOLDER
python -m bench.lds tables cifar2
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console

from pyattr.cli.display import Display
from pyattr.report.numbers import write_results

from . import ablations, build, costs, deletion, scores, tables
from .methods import Materials
from .problem import PROBLEMS, SCHEDULE, TIMESTEPS

STAGES = ("draw", "main", "evaluation", "retraining", "scores", "ablations", "deletion", "costs", "tables")
RETRAINING = ("evaluation", "retraining")
GROUPS = ("similarity", "patches", "10", "changes", "100", "retrained")


def main() -> None:
    """Run one stage of one problem."""
    parser = argparse.ArgumentParser(prog="python -m bench.lds", description="Make the LDS benchmark.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("problem", choices=sorted(PROBLEMS))
    parser.add_argument("--data", type=Path, help="the original images, .npz (draw)")
    parser.add_argument("--work", type=Path, help="where training states and features are kept (all others)")
    parser.add_argument("--workers", type=int, default=2, help="processes that train, a thread each")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="of methods (scores)")
    parser.add_argument("--ablate", nargs="+", choices=list(ablations.GROUPS), default=list(ablations.GROUPS))
    parser.add_argument(
        "--timesteps",
        type=int,
        help=f"evenly spaced ones that losses are means over, {SCHEDULE.num_timesteps} for all; of others than the default, "
        f"{TIMESTEPS}, in files named by them, as evaluation-{SCHEDULE.num_timesteps}.safetensors ({' and '.join(RETRAINING)})",
    )
    given = parser.parse_args()
    wanted = {"draw": "data", "tables": None}.get(given.stage, "work")
    if wanted and getattr(given, wanted) is None:
        parser.error(f"{given.stage} needs --{wanted}")
    if given.timesteps is not None:
        if given.stage not in RETRAINING:
            parser.error(f"--timesteps goes with {' or '.join(RETRAINING)}, got {given.stage}")
        if not 1 <= given.timesteps <= SCHEDULE.num_timesteps:
            parser.error(f"--timesteps must lie in [1, {SCHEDULE.num_timesteps}], got {given.timesteps}")
    problem = PROBLEMS[given.problem]
    with Display(Console()) as display:
        if given.stage == "draw":
            build.draw(problem, given.data)
        elif given.stage == "tables":
            tables.update(problem)
        elif given.stage == "main":
            build.main_model(problem, given.work / problem.name, display.progress)
        elif given.stage == "scores":
            scores.write(problem, given.work / problem.name, list(given.groups), display.progress)
        elif given.stage == "deletion":
            torch.set_num_threads(1)
            deletion.remove(problem, given.work / problem.name, given.workers, display.progress)
        elif given.stage == "costs":
            costs.measure(problem, given.work / problem.name)
        elif given.stage == "ablations":
            materials = Materials(problem, given.work / problem.name, display.progress)
            (problem.folder / "ablations").mkdir(exist_ok=True)
            for group in given.ablate:
                write_results(problem.folder / "ablations" / f"{group}.json", ablations.judged(materials, group))
        else:
            torch.set_num_threads(1)  # of each worker; results depend on it in the last bit
            work = given.work / problem.name
            build.retrain(problem, given.stage, work, given.workers, display.progress, given.timesteps)


if __name__ == "__main__":
    main()
