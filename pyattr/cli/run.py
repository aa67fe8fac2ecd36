"""What each command does: plan the stages, check for room, run them in order, say where the results are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import report
from ..attribution import Readout
from ..datasets import DataError, ImageDataset
from ..report.page import seconds_text
from .display import Display
from .latents import Encoding, LatentCheckpoint, Prompts
from .options import (
    NEEDS_MODEL,
    DataOptions,
    KeepOptions,
    LatentOptions,
    Machine,
    MethodOptions,
    ReadoutOptions,
    SampleOptions,
    TrainOptions,
)
from .results import settings_dict, write_report, write_scores
from .scoring import EnsembleScoring, Scoring, scoring_of
from .stages import (
    Checkpoint,
    Queries,
    Sampling,
    Step,
    Training,
    image_shape,
    load_data,
    queries_of_data,
    queries_of_samples,
    shape_text,
)
from .workspace import Stage, Workspace, WorkspaceError

# Checkpoint.trained_on of the scored images -> what there is to say of them
OTHER_IMAGES = {
    True: [],
    False: [
        "The scored images are not those that the model was trained on, so the scores cannot tell what made the model."
    ],
    None: ["The model’s file does not say on which images it was trained; whether on these, nobody checked."],
}
PAGE_BYTES = 20e6  # room for the report and the scores' settings, generously


class Session:
    """One command at work in one output folder.

    Args:
        workspace: the folder.
        display: where progress goes.
        device: where models run.
    """

    def __init__(self, workspace: Workspace, display: Display, device: torch.device):
        self.workspace, self.display, self.device = workspace, display, device
        self.steps: list[Step] = []

    def load(self, options: DataOptions) -> ImageDataset:
        """The images, told about."""
        data = load_data(options)
        classes = f", {len(data.class_names)} classes" if data.labels is not None else ""
        self.display.say(f"{len(data):,} images of {shape_text(data.shape)}{classes} from {data.name}")
        return data

    def plan(self, steps: Sequence[Step]) -> None:
        """Show what is to be done, and refuse when the disk has no room for it.

        Raises:
            WorkspaceError: too little room.
        """
        self.steps = list(steps)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for number, step in enumerate(steps, 1):
            table.add_row(f"{number}/{len(steps)}", step.title, step.detail, Text(step.status, "dim"))
        self.display.console.print(table)
        size = sum(max(0, step.size - step.stage.written) for step in steps if not step.stage.finished)
        self.workspace.need_space(int(size + PAGE_BYTES), "what is to be done")

    def begin(self, step: Step, label: str = "") -> None:
        """Progress from here on belongs to this step of the plan."""
        number = [each.stage.key for each in self.steps].index(step.stage.key) + 1
        self.display.stage(f"{number}/{len(self.steps)} {label}")

    def train(self, training: Training, data: DataOptions) -> torch.nn.Module:
        """The trained model."""
        self.begin(training)
        model = training.run(self.display, self.device)
        self.workspace.remember("train", {"stage": training.stage.key})
        self.workspace.remember("data", dataclasses.asdict(data))
        return model

    def generate(self, sampling: Sampling, model: torch.nn.Module) -> Queries:
        """Generated images as queries."""
        self.begin(sampling)
        samples = sampling.run(model, self.display)
        self.workspace.remember("generate", {"stage": sampling.stage.key})
        return queries_of_samples(samples, sampling.stage.key)

    def score(self, scoring: Scoring, model: torch.nn.Module | None, queries: Queries) -> report.Attribution:
        """One method's scores."""
        return scoring.run(model, queries, self.display, lambda step: self.begin(step, f"{scoring.name} "))

    def finish(
        self,
        title: str,
        data: ImageDataset,
        queries: Queries,
        scorings: Sequence[Scoring],
        attributions: Sequence[report.Attribution],
        *,
        earlier: Sequence[Step] = (),
        top: int,
        page: bool = True,
        caveats: Sequence[str] = (),
    ) -> None:
        """Write scores.npz and report.html, and say so."""
        folder = self.workspace.folder
        steps = [*earlier, *self.steps]
        settings = settings_dict(data, steps, scorings)
        write_scores(folder / "scores.npz", data, scorings[0].train, queries, attributions, settings, top)
        if page:
            write_report(
                folder / "report.html",
                title=title,
                data=data,
                queries=queries,
                attributions=attributions,
                scorings=scorings,
                steps=steps,
                caveats=caveats,
                top=top,
            )
        total = sum(step.timing().seconds for step in steps)
        self.display.say(f"done; {seconds_text(total)} of computing in all")
        self.display.say(f"scores  {folder / 'scores.npz'}")
        if page:
            self.display.say(f"report  {folder / 'report.html'}")


@contextlib.contextmanager
def session(out: Path, machine: Machine) -> Iterator[Session]:
    """Hold the output folder and show progress while a command runs.

    Raises:
        WorkspaceError: the folder cannot be used, or the device is not there.
    """
    device = device_of(machine.device)
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    with Workspace(out) as workspace, Display(Console()) as display:
        yield Session(workspace, display, device)


def device_of(name: str) -> torch.device:
    """The torch device of this name; "auto" takes a GPU when there is one.

    Raises:
        WorkspaceError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise WorkspaceError(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise WorkspaceError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs: use --device cpu")
    return device


def train(out: Path, data: DataOptions, options: TrainOptions, keep: KeepOptions, machine: Machine) -> None:
    """Train a model in an output folder."""
    with session(out, machine) as work:
        images = work.load(data)
        training = Training(work.workspace, images, options, keep)
        work.plan([training])
        work.train(training, data)
        losses = training.stage.record["losses"]
        work.display.say(f"done; training loss {losses[0]:.3g} at first, {losses[-1]:.3g} at last")
        work.display.say(f"model  {training.stage.folder}")


def generate(out: Path, checkpoint: Path | None, options: SampleOptions, machine: Machine) -> None:
    """Generate images in an output folder."""
    with session(out, machine) as work:
        model_at, _ = _model(work.workspace, checkpoint)
        model = model_at.run(work.device)
        sampling = Sampling(work.workspace, model_at.key, image_shape(model), options, model_at.schedule)
        work.plan([sampling])
        work.generate(sampling, model)
        work.display.say(f"done; images  {sampling.stage.folder}")


def attribute(
    out: Path,
    data: DataOptions | None,
    models: Sequence[Path] | LatentOptions,
    queries: DataOptions | None,
    options: Sequence[MethodOptions],
    readout: ReadoutOptions | None,
    machine: Machine,
    *,
    top: int,
    page: bool,
) -> None:
    """Score training images for generated or given images in an output folder.

    Of several models scores are means; of none given, it is the folder's own. Models of latents need data and queries.
    Methods that ask no model do without one where there is none and training images and queries are given.
    """
    if page:
        report.require()
    read = None if readout is None else Readout(readout.kind, readout.percent)
    with session(out, machine) as work:
        modelless = not NEEDS_MODEL & {each.method for each in options}
        if modelless and not models and _trained(work.workspace) is None:
            if data is None or queries is None:
                raise WorkspaceError(
                    f"no trained model in {out}: give --data and --queries, enough for "
                    f"{' and '.join(each.method for each in options)}, or run `pyattr train SOURCE --out {out}` first"
                )
            job = _job_without_model(work, data, queries, options, read)
        else:
            job = _job(work, data, models, queries, options, read)
        for scoring in job.scorings:
            scoring.check(job.queries)
        steps: list[Step] = [] if job.encoding is None else [job.encoding]
        steps += [step for scoring in job.scorings for step in scoring.plan(job.queries.key, len(job.queries.images))]
        work.plan({step.stage.key: step for step in steps}.values())  # methods may share features
        asked = job.queries
        if job.encoding is not None:
            work.begin(job.encoding)
            train, examples = job.encoding.run(work.display)
            asked = dataclasses.replace(asked, examples=examples)
            for scoring in job.scorings:
                scoring.take(train)
        attributions = [work.score(scoring, job.model, asked) for scoring in job.scorings]
        work.finish(
            f"Which training images {job.scorings[0].title} these images?",
            job.images,
            asked,
            job.scorings,
            attributions,
            earlier=job.earlier,
            top=top,
            page=page,
            caveats=job.caveats,
        )


@dataclass(frozen=True)
class _Job:
    """What there is to attribute.

    Args:
        images: the training images.
        queries: the images to attribute.
        scorings: the methods.
        model: None where no method asks it.
        earlier: steps that finished before this command.
        caveats: what the report must say of the images.
        encoding: makes of images what the model takes; None where that is the images.
    """

    images: ImageDataset
    queries: Queries
    scorings: Sequence[Scoring]
    model: torch.nn.Module | None = None
    earlier: Sequence[Step] = ()
    caveats: Sequence[str] = ()
    encoding: Encoding | None = None


def _job_without_model(
    work: Session, data: DataOptions, queries: DataOptions, options: Sequence[MethodOptions], readout: Readout | None
) -> _Job:
    images = work.load(data)
    asked = queries_of_data(work.load(queries), images)
    scorings = [scoring_of(work.workspace, None, images, each, readout=readout, device=work.device) for each in options]
    return _Job(images, asked, scorings)


def _job(
    work: Session,
    data: DataOptions | None,
    models: Sequence[Path] | LatentOptions,
    queries: DataOptions | None,
    options: Sequence[MethodOptions],
    readout: Readout | None,
) -> _Job:
    if isinstance(models, LatentOptions):
        return _job_of_latents(work, data, models, queries, options, readout)
    found = [_model(work.workspace, place) for place in models or (None,)]
    places, trained = [model_at for model_at, _ in found], found[0][1]
    _check_alike(places)
    shape = _shape_of(places)
    model_at = places[0]
    generated = work.workspace.existing(work.workspace.recall("generate").get("stage", "."))
    if queries is None and (generated is None or generated.settings["model"] != model_at.key):
        out = work.workspace.folder
        raise WorkspaceError(
            f"no images of this model in {out} to attribute: give --queries, or run `pyattr generate --out {out}` first"
        )
    images, caveats = _training_images(work, data, places)
    if images.shape != shape:
        fits = images.shape[0] == shape[0] and shape[1] == shape[2]
        raise DataError(
            f"data: the images are {shape_text(images.shape)} and those of the model {shape_text(shape)}: "
            + (f"give --size {shape[1]}, or " if fits else "give ")
            + "the images that it was trained on"
        )
    model = model_at.run(work.device)
    scorings = [_scoring(work, places, images, each, readout) for each in options]
    earlier = [Step("Training", "", trained, 0)] if trained is not None else []
    if queries is None:
        # Reads what lies there; the images of an earlier `generate` are not made again.
        made = generated.settings
        settings = {name: made[name] for name in SampleOptions.__dataclass_fields__ if name in made}
        sampling = Sampling(work.workspace, model_at.key, shape, SampleOptions(**settings), model_at.schedule)
        asked = queries_of_samples(sampling.run(model, work.display), sampling.stage.key)
        earlier.append(sampling)
    else:
        if queries.size is None and data is None:  # read as the training images that nobody named were
            queries = dataclasses.replace(queries, size=work.workspace.recall("data").get("size"))
        asked = queries_of_data(work.load(queries), images)
    return _Job(images, asked, scorings, model, earlier, caveats)


def _job_of_latents(
    work: Session,
    data: DataOptions,
    models: LatentOptions,
    queries: DataOptions,
    options: Sequence[MethodOptions],
    readout: Readout | None,
) -> _Job:
    prompts = Prompts(models.prompts)
    places = [LatentCheckpoint(models.pipeline, prompts.prompts, lora) for lora in models.loras]
    _check_alike(places)
    images, caveats = _training_images(work, data, places)
    given = work.load(queries)
    asked = queries_of_data(given, images)
    encoding = Encoding(work.workspace, models, prompts, images, given, work.device)
    asked = dataclasses.replace(asked, key=encoding.queries_key)
    scorings = [_scoring(work, places, images, each, readout, told=encoding.train_key) for each in options]
    model = places[0].run(work.device)
    return _Job(images, asked, scorings, model, caveats=caveats, encoding=encoding)


def _scoring(
    work: Session,
    places: Sequence[Checkpoint | LatentCheckpoint],
    images: ImageDataset,
    options: MethodOptions,
    readout: Readout | None,
    *,
    told: str = "",
) -> Scoring:
    """Of a method and one model, or the mean over several where the method asks them; `told` names what images became."""
    asked = places if options.method in NEEDS_MODEL else places[:1]
    parts = [
        scoring_of(
            work.workspace,
            place.key + told,
            images,
            options,
            place.schedule,
            model=place,
            readout=readout,
            device=work.device,
        )
        for place in asked
    ]
    return parts[0] if len(parts) == 1 else EnsembleScoring(parts, asked, work.device)


def _check_alike(places: Sequence[Checkpoint | LatentCheckpoint]) -> None:
    """Refuse models whose scores have no mean.

    Raises:
        WorkspaceError: one of them is given twice, or schedules differ.
    """
    for number, place in enumerate(places):
        for other in places[:number]:
            if place.key == other.key:
                raise WorkspaceError(f"{place.path} and {other.path} are the same model: give each once")
            if place.schedule != other.schedule:
                raise WorkspaceError(
                    f"{place.path} and {other.path} were trained with different noise schedules: score by one after the other"
                )


def _shape_of(places: Sequence[Checkpoint]) -> tuple[int, int, int]:
    """Of the images that the models take, from what their files say.

    Raises:
        WorkspaceError: one does not say how its network is built, or takes images of another size or other channels.
    """
    shapes = [place.shape for place in places]
    for place, shape in zip(places, shapes, strict=True):
        if shape is None:
            raise WorkspaceError(
                f"{place.file} does not say how its network is built: write it again by pyattr.diffusion.save_model, of a "
                "diffusers UNet2DModel or a preset"
            )
        if shape != shapes[0]:
            raise WorkspaceError(
                f"{place.file} is a model of images of {shape_text(shape)}, and {places[0].file} of {shape_text(shapes[0])}: "
                "score by one after the other"
            )
    return shapes[0]


def _trained(workspace: Workspace) -> Stage | None:
    """The stage that trained the folder's model."""
    return workspace.existing(workspace.recall("train").get("stage", "."))


def _model(workspace: Workspace, checkpoint: Path | None) -> tuple[Checkpoint, Stage | None]:
    """The checkpoint asked for or the one trained in the folder, and in the latter case the stage that trained it."""
    if checkpoint is not None:
        return Checkpoint(checkpoint, named=True), None
    trained = _trained(workspace)
    if trained is None:
        raise WorkspaceError(
            f"no trained model in {workspace.folder}: run `pyattr train SOURCE --out {workspace.folder}` first, "
            "or give --checkpoint"
        )
    return Checkpoint(trained.folder, trained.key), trained


def _training_images(
    work: Session, given: DataOptions | None, models: Sequence[Checkpoint | LatentCheckpoint]
) -> tuple[ImageDataset, list[str]]:
    """The images to score, by default those that the models were trained on, and what the report must say of them.

    Raises:
        WorkspaceError: none are given, and those of a model are not known or not there any more.
    """
    if given is not None:
        images = work.load(given)
        known = [model.trained_on(images) for model in models]
        told = OTHER_IMAGES[False if False in known else None if None in known else True]
        for line in told:
            work.display.say(line)
        return images, told
    remembered = work.workspace.recall("data")
    home = work.workspace.folder / work.workspace.recall("train").get("stage", ".")
    for model in models:
        if not remembered or model.file.resolve().parent != home.resolve():
            raise WorkspaceError(f"the training images of {model.path} are not known: give --data")
    images = work.load(DataOptions(**remembered))
    if not all(model.trained_on(images) for model in models):
        raise WorkspaceError(
            f"{remembered['source']} has changed since the model was trained on it: "
            "train again, put the images back, or give --data to score the images as they are now"
        )
    return images, []
