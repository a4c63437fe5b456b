"""The settings of every verb: plain frozen dataclasses, cheap to import, checked where they are made.

The string under a field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

Attribute = Literal["texture", "geometry", "camera", "lighting"]
ATTRIBUTES: tuple[Attribute, ...] = ("texture", "geometry", "camera", "lighting")
Method = Literal["none", "full", "lora", "pissa", "adalora", "psv", "subspace"]
METHODS: tuple[Method, ...] = ("none", "full", "lora", "pissa", "adalora", "psv", "subspace")
Heads = Literal["lora", "frozen"]
HEADS: tuple[Heads, ...] = ("lora", "frozen")
GRADIENT_BATCHES = 4
"""Batches of a gradient adapter where no number is given."""
Variant = Literal["auto", "cuda", "llvm", "scalar"]


def _flag(name: str) -> Any:
    """The name of a flag that Python has reserved; evaluated by the command line alone."""
    import tyro

    return tyro.conf.arg(name=name)


def require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """The settings of a verb whose jobs a Ray cluster can do."""

    ray: str = ""
    """Address of a Ray cluster (auto, HOST:PORT or ray://HOST:PORT) that does the jobs; empty: this machine does."""
    ray_cpus: int = 1
    """With ray: cores of one job."""
    ray_gpus: float | None = None
    """With ray: GPUs of one job, or a part of one; none: 1 where the cluster has any and the job can use it."""

    def __post_init__(self) -> None:
        require(self.ray_cpus >= 1, "ray_cpus", "at least 1", self.ray_cpus)
        gpus, rule = self.ray_gpus, "in [0, 1] or a whole number"
        # Ray gives away parts of one GPU, or whole ones
        require(gpus is None or 0 <= gpus <= 1 or gpus == int(gpus) > 0, "ray_gpus", rule, gpus)

    def cluster_options(self) -> dict[str, Any]:
        """The same settings for another verb."""
        return {"ray": self.ray, "ray_cpus": self.ray_cpus, "ray_gpus": self.ray_gpus}


@dataclass(frozen=True)
class DoctorConfig:
    """Say what this machine has and what is missing."""

    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class GenerateConfig(ClusterOptions):
    """Render multi-view scenes in which one attribute varies from scene to scene: OUT/<data set>/<scene>/scene.json."""

    out: Path = Path()
    """Folder of the data sets; must be given except with validate."""
    attribute: Literal["texture", "geometry", "camera", "lighting", "all"] = "texture"
    """What varies within a data set; the other attributes are drawn once per data set. all: everything varies."""
    preset: Literal["paper", "release", "generic"] = "paper"
    """paper: extreme ranges. release: those of the authors' release. generic: milder, objects on a ground."""
    regime: Literal["object", "room"] = "object"
    """object: a group of objects alone. room: an indoor scene with walls, a window and furniture."""
    trajectory: Literal["wide", "walk", "tremor"] = "wide"
    """wide: a path around the objects, or views from all over the room. walk, tremor: micro-baseline videos."""
    task: Literal["none", "faces", "bodies", "glass"] = "none"
    """Render a task instead: data sets <task>_train, <task>_test (in-domain) and <task>_cross (cross-domain)."""
    textures: Path | None = None
    """Folder of texture maps (basecolor, roughness, metallic, normal) to draw materials from; none: procedural ones."""
    pictures: Path | None = None
    """Folder of face images for the task faces; none: drawn ones."""
    datasets: int = 1
    """Number of data sets, named <name>_00, <name>_01, ...; a task has its three splits instead."""
    scenes: int = 200
    """Scenes per data set; each test split of a task has a fifth of it."""
    views: int | None = None
    """Images per scene; none: 100 on wide paths, 48 in rooms, 42 in videos, 96 of bodies, 60 of glass."""
    arc: float = 360.0
    """Degrees of the ring of cameras around bodies that the views fill evenly: 6 views of 120 are 20 degrees apart."""
    resolution: int = 518
    """Image width in pixels; images are square, or 3:4 portrait with trajectory tremor."""
    spp: int = 64
    """Samples per pixel."""
    seed: int = 0
    """Root seed; every random draw follows from it."""
    name: str = ""
    """Prefix of the data set names; empty: the attribute or the task."""
    workers: int = 0
    """Processes; 0: one per core."""
    variant: Variant = "auto"
    """Mitsuba variant; auto: the fastest that works on this machine."""
    from_: Annotated[Literal["thuman", "2k2k", "clearpose", "soap", "hndr", "rgbd"] | None, _flag("from")] = None
    """Convert a data set on disk, in its official layout, instead of rendering scenes: OUT/<from>_<split>/<scene>."""
    root: Path | None = None
    """Folder of the data set to convert; only with from."""
    only: tuple[str, ...] = ()
    """Convert only the scenes of these names; none: all."""
    frame_step: int = 0
    """Keep the frames whose number is a multiple of it; 0: 1, for clearpose the paper's 100 (to test 12 of these)."""
    max_side: int = 0
    """Reduce images whose longer side has more pixels than this to it; 0: keep them as they are."""
    scan_views: int = 96
    """Views around each scan of thuman and 2k2k."""
    scan_scale: float = 1.0
    """Factor on the size of the scans of thuman and 2k2k."""
    poses: Literal["c2w", "w2c"] = "c2w"
    """What the poses of an rgbd folder are: camera-to-world (TUM) or camera-from-world."""
    depth_scale: float = 0.0
    """Metres per step of the depth pngs of an rgbd folder; 0: 0.0002 beside TUM's rgb.txt, else 0.001."""
    allow_pickle: bool = False
    """Read the pickled members of soap and hndr bundles, of which only numpy arrays and plain values are accepted."""
    validate: Path | None = None
    """Check the scenes at or below this folder instead of making any; exit code 2 when there are errors."""
    json: bool = False
    """Print the result of validate as one JSON object."""
    preview: bool = False
    """Only render a few small scenes per attribute, or per split of the task, and contact sheets below OUT/preview."""

    def __post_init__(self) -> None:
        require(self.out != Path() or self.validate is not None, "out", "given (--out DIR)", str(self.out))
        require((self.from_ is None) == (self.root is None), "root", "given with from, and only with it", self.root)
        for name in ("frame_step", "max_side", "depth_scale"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        require(self.scan_views >= 1, "scan_views", "at least 1", self.scan_views)
        require(self.scan_scale > 0, "scan_scale", "positive", self.scan_scale)
        for name in ("datasets", "scenes", "resolution", "spp"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.views is None or self.views >= 1, "views", "at least 1", self.views)
        require(0 < self.arc <= 360, "arc", "in (0, 360]", self.arc)
        if self.task != "bodies":
            require(self.arc == 360, "arc", "given with the task bodies only", self.arc)
        require(self.workers >= 0, "workers", "at least 0", self.workers)
        super().__post_init__()
        if self.task != "none":
            require(self.datasets == 1, "datasets", "1 with a task, which has splits", self.datasets)
        if self.task != "faces":
            require(self.pictures is None, "pictures", "given with the task faces only", self.pictures)

    @property
    def scene_views(self) -> int:
        """Images per scene, resolved."""
        if self.views is not None:
            return self.views
        if self.task != "none":
            return {"faces": 42, "bodies": 96, "glass": 60}[self.task]
        return 42 if self.trajectory != "wide" else 100 if self.regime == "object" else 48


@dataclass(frozen=True)
class TrainConfig:
    """One optimisation run; the same fields for pre-training, adapters and fine-tuning."""

    steps: int = 400
    """Optimiser steps."""
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises linearly from 1e-3 of lr; cosine to 1e-3 of lr afterwards."""
    clip_norm: float = 1.0
    """L2 gradient clip, separately for aggregator, depth head and camera head."""
    camera_weight: float = 5.0
    """Weight of the camera loss beside a depth loss of weight 1."""
    frames: tuple[int, int] = (2, 6)
    """Least and most frames drawn per scene."""
    images_per_step: int = 16
    """Images in one step, over all processes; scenes per step = images_per_step // frames."""
    max_images: int = 0
    """Most images in one forward pass of one process: the budget that sets the memory. A larger step is accumulated,
    with the same gradients. 0: all at once."""
    image_size: int = 0
    """Images are resized to this many pixels a side; 0: the backbone's own size."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast type; weights and optimiser state stay fp32."""
    checkpointing: bool = True
    """Recompute block activations in the backward pass: less memory, about a third more time."""
    check_memory: bool = True
    """Print an estimate of the memory first, and refuse to start where the device has less left."""
    augment: bool = False
    """Colour jitter on the training images."""
    save_every: int = 200
    """Steps between checkpoints; the newest two are kept."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the figures of every step go besides metrics.jsonl."""
    seed: int = 0
    """Order of scenes and frames, initialisation of adapters."""
    device: str = "auto"
    """auto: cuda when there is one, else cpu."""
    threads: int = 0
    """CPU threads; 0: torch's default."""
    aspect: tuple[float, float] = (1.0, 1.0)
    """Range of height / width of the images, drawn per step (the paper: 0.33 1); 1 1: square."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of the share of an image's height and width that is kept, drawn per image, capped at 1 (paper: 0.8 1.2)."""
    nearby: float = 0.0
    """Frames of a scene come from a stretch of so many times their number, in recorded order; 0: the whole scene."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", "at least 1", self.steps)
        require(self.lr > 0, "lr", "positive", self.lr)
        require(0 <= self.warmup < 1, "warmup", "in [0, 1)", self.warmup)
        require(self.camera_weight >= 0, "camera_weight", "at least 0", self.camera_weight)
        require(1 <= self.frames[0] <= self.frames[1], "frames", "1 <= least <= most", self.frames)
        require(
            self.images_per_step >= self.frames[1],
            "images_per_step",
            f"at least the most frames per scene ({self.frames[1]})",
            self.images_per_step,
        )
        require(
            self.max_images == 0 or self.max_images >= self.frames[1],
            "max_images",
            f"0 or at least the most frames per scene ({self.frames[1]})",
            self.max_images,
        )
        require(self.save_every >= 1, "save_every", "at least 1", self.save_every)


def _check_cache(folder: Path | None, gigabytes: float, train: TrainConfig) -> None:
    if folder is not None:
        same = "with cache_tokens (the same image must look the same)"
        require(not train.augment, "augment", f"off {same}", True)
        for name in ("aspect", "zoom"):
            require(getattr(train, name) == (1.0, 1.0), name, f"1 1 {same}", getattr(train, name))
        require(gigabytes > 0, "cache_gigabytes", "positive", gigabytes)


@dataclass(frozen=True)
class AdaptConfig(ClusterOptions):
    """Tune one stock PEFT LoRA per data set found below SCENES; OUT/<data set> is a PEFT adapter folder."""

    scenes: Path
    """Folder with data sets anywhere below it (a data set is a folder of scenes)."""
    out: Path
    """Adapters are written below it at the same relative paths."""
    backbone: str = "vggt-nano"
    """vggt-nano or vggt-1b."""
    weights: Path | None = None
    """Weights of the backbone; none: those shipped with the package (nano only)."""
    rank: int = 16
    """LoRA rank r; lora_alpha is 2 r."""
    targets: str = "all"
    """Target preset: aggregator, heads, all."""
    gradient_steps: int = 0
    """lora_A starts at the leading directions of the loss's gradient over this many steps; 0: at random, as LoRA."""
    gradient_only: bool = False
    """Tune nothing: the adapter is the rank-r part of the loss's negative gradient in gradient-steps batches (4)."""
    gradient_gigabytes: float = 4.0
    """gradient-only: most host memory for gradients, in 1e9 bytes; less takes more passes over the same batches."""
    workers: int = 0
    """Adapters tuned at a time, each in a process of its own; 0: one per GPU, on the CPU one."""
    cache_tokens: Path | None = None
    """Folder for the frozen image encoder's tokens: each image is encoded once. Not with augmentation."""
    cache_gigabytes: float = 20.0
    """Most that is kept there, in 1e9 bytes."""
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def batches(self) -> int:
        """With gradient_only: batches whose gradient is summed."""
        return self.gradient_steps or GRADIENT_BATCHES

    def __post_init__(self) -> None:
        require(self.gradient_steps >= 0, "gradient_steps", "at least 0", self.gradient_steps)
        require(self.gradient_gigabytes > 0, "gradient_gigabytes", "positive", self.gradient_gigabytes)
        require(self.workers >= 0, "workers", "at least 0", self.workers)
        super().__post_init__()
        _check_cache(self.cache_tokens, self.cache_gigabytes, self.train)


@dataclass(frozen=True)
class MineConfig:
    """Mine the subspace that all PEFT adapters below ADAPTERS share, module by module."""

    adapters: Path
    """Every PEFT adapter folder below it is one adapter."""
    out: Path
    """Subspace file (.safetensors)."""
    k: int = 16
    """Rank of the shared subspace."""
    p: float = 1.0
    """Exponent of the residual norm, 0 < p <= 2; 2 is the plain mean."""
    eps: float = 1e-3
    """Smoothing, relative to the median norm of the updates."""
    max_iter: int = 50
    """Most IRLS iterations."""
    tol: float = 1e-6
    """Stop when no weight moves by more than this, relative."""

    def __post_init__(self) -> None:
        require(self.k >= 1, "k", "at least 1", self.k)
        require(0 < self.p <= 2, "p", "in (0, 2]", self.p)
        require(self.eps > 0, "eps", "positive", self.eps)
        require(self.max_iter >= 1, "max_iter", "at least 1", self.max_iter)
        require(self.tol >= 0, "tol", "at least 0", self.tol)


@dataclass(frozen=True)
class AnalyzeConfig:
    """Spectra, disentanglement and, given the adapters, stability of mined subspaces as JSON and PNG."""

    subspaces: tuple[Path, ...]
    """Subspace files, or folders of them; a file's stem names its attribute."""
    out: Path
    """Folder for analysis.json and the figures."""
    adapters: tuple[Path, ...] = ()
    """Folders with the adapters that the subspaces were mined from. With them each adapter is left out in turn: is the
    subspace stable, and how much of an adapter that it has not seen does it explain?"""


@dataclass(frozen=True)
class FinetuneConfig:
    """Tune a backbone on scenes by one method."""

    scenes: Path
    """Training scenes: a folder with scenes anywhere below it, or a YAML file of such folders and their shares."""
    out: Path
    """Run folder."""
    method: Method = "subspace"
    """none: only writes the run folder, so that it can be evaluated as the base."""
    backbone: str = "vggt-nano"
    """vggt-nano or vggt-1b."""
    weights: Path | None = None
    """Weights of the backbone; none: those shipped with the package (nano only)."""
    subspaces: tuple[Path, ...] = ()
    """subspace: mined subspace files (or folders of them), whose concatenation is the frozen basis; or one file that
    holds a combined basis, of this project or in the layout of the authors' release."""
    attributes: tuple[str, ...] = ()
    """subspace: only these of the subspace files, by their names without suffix; none: all."""
    k: int = 0
    """subspace: keep only this many leading directions of each attribute; 0: all."""
    K: int = 0
    """subspace: keep only this many leading principal directions of the concatenation; 0: all. psv: leading singular
    vectors of each weight."""
    head_cores: bool = False
    """subspace and psv: also a core on every head module as wide as the depth head's features, beside its LoRA."""
    heads: Heads = "lora"
    """subspace and psv: lora: plain LoRA of rank r on both heads, as in the paper. frozen: only the cores are trained."""
    start: Literal["zero", "fit"] = "zero"
    """subspace and psv: where the cores start. fit: one step down the projected gradient, its length by line search."""
    rank: int = 16
    """LoRA rank: of the whole adapter for lora, pissa, adalora; of the adapters on the heads for psv and subspace."""
    targets: str = "all"
    """lora, pissa, adalora: target preset (aggregator, heads, all), or an expression that full module names match."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest checkpoint in OUT, if there is one. never: start over."""
    cache_tokens: Path | None = None
    """Folder for the frozen image encoder's tokens: each image is encoded once. Not with augmentation."""
    cache_gigabytes: float = 20.0
    """Most that is kept there, in 1e9 bytes."""
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", "at least 1", self.rank)
        require(self.k >= 0, "k", "at least 0", self.k)
        require(self.K >= 0, "K", "at least 0", self.K)
        require(
            self.start == "zero" or self.method in ("psv", "subspace"),
            "start",
            "zero for a method without cores",
            self.start,
        )
        require(self.method != "psv" or self.K >= 1, "K", "at least 1 for the method psv", self.K)
        _check_cache(self.cache_tokens, self.cache_gigabytes, self.train)


@dataclass(frozen=True)
class ExportConfig:
    """Write the result of a fine-tuning run in a format that other software loads."""

    run: Path
    """Run folder of finetune."""
    to: Literal["lora", "authors"] = "lora"
    """lora: one plain PEFT LoRA with the same outputs. authors: the basis as the authors' .A/.B file, without cores."""
    out: Path | None = None
    """What to write; none: RUN/export/lora or RUN/export/basis.safetensors."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a backbone and tuned runs of it on scenes: point clouds, depth, cameras; per scene and mean."""

    scenes: Path
    """Test scenes: a folder with scenes anywhere below it."""
    out: Path
    """Folder for results.json and the depth pictures."""
    tuned: tuple[Path, ...] = ()
    """Run folders of finetune; the base model is always measured beside them."""
    backbone: str = "vggt-nano"
    """vggt-nano or vggt-1b."""
    weights: Path | None = None
    """Weights of the backbone; none: those shipped with the package (nano only)."""
    frames: int = 8
    """Frames used per scene, evenly spaced."""
    icp_threshold: float = 0.1
    """Largest correspondence distance of ICP, in scene units."""
    images: int = 4
    """Scenes whose images and depth maps are kept for the report."""
    device: str = "auto"
    """auto: cuda when there is one, else cpu."""


@dataclass(frozen=True)
class ReportConfig:
    """Write one self-contained HTML page about a run folder."""

    run: Path
    """Run folder of demo, or any folder with results.json and analysis.json below it."""
    out: Path | None = None
    """Page to write; none: RUN/report/index.html."""


@dataclass(frozen=True)
class ViewConfig:
    """Show true and predicted points and cameras in a browser, live."""

    path: Path
    """Run folder with an evaluation, or a folder of scenes, which are predicted as they are opened."""
    tuned: tuple[Path, ...] = ()
    """Run folders of finetune, shown beside the base model; for a folder of scenes only."""
    backbone: str = "vggt-nano"
    """vggt-nano or vggt-1b; for a folder of scenes only."""
    weights: Path | None = None
    """Weights of the backbone; none: those shipped with the package (nano only)."""
    frames: int = 8
    """Frames shown per scene, evenly spaced, at most 8."""
    device: str = "auto"
    """auto: cuda when there is one, else cpu."""
    host: str = "localhost"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8080
    """Port to listen on; the next free one when it is taken."""

    def __post_init__(self) -> None:
        require(1 <= self.frames <= 8, "frames", "1 to 8", self.frames)
        require(0 < self.port < 65536, "port", "1 to 65535", self.port)


@dataclass(frozen=True)
class ParamsConfig:
    """Count trainable parameters of a method, without loading weights."""

    backbone: str = "vggt-1b"
    """vggt-nano or vggt-1b."""
    method: Method = "lora"
    """Tuning method; pissa counts like lora, psv like subspace."""
    rank: int = 16
    """r for the LoRA family, K for subspace and psv."""
    head_cores: bool = False
    """subspace and psv: also a core on every head module as wide as the depth head's features, beside its LoRA."""
    json: bool = False
    """Print the counts per part as JSON."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", "at least 1", self.rank)


@dataclass(frozen=True)
class BenchConfig:
    """Time the fused layer or the mining beside its peers: bench linear, block, step or mining."""

    benchmark: Literal["linear", "block", "step", "mining"] = "linear"
    """linear: one layer, every peer. block: one VGGT-1B block. step: a training step. mining: IRLS and dense route."""
    out: Path | None = None
    """Folder that gets the rows as <device>.jsonl; without it they are only printed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure; auto: the GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "autocast"] = "auto"
    """autocast: float32 weights under bfloat16 autocast. auto: autocast on a GPU, fp32 on a CPU."""
    views: tuple[int, ...] = (2,)
    """linear, block, step: images of 1,374 tokens; several values are several cases."""
    shapes: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = ("qkv", "proj", "fc1", "fc2")
    """linear: which layers of VGGT-1B."""
    cores: tuple[int, ...] = (64,)
    """linear, block, step: K, columns of the subspaces; several values are several cases."""
    rank: int = 16
    """LoRA rank r of the peers, and of the adapters that are mined."""
    peers: tuple[str, ...] = ()
    """linear: which peers, by the names in subspace3d.bench.peers; empty: all (on a CPU all but lora-compiled
    and fold-separate)."""
    rounds: int = 0
    """Interleaved rounds; 0: 30 on a GPU, 7 on a CPU."""
    clock: Literal["wall", "process"] = "wall"
    """On a CPU. process: processor time, for a machine that others use too; only with OMP_NUM_THREADS=1."""
    backbone: Literal["auto", "vggt-nano", "vggt-1b"] = "auto"
    """step: which model, random weights; auto: vggt-1b on a GPU, vggt-nano on a CPU."""
    layers: int = 48
    """mining: matrices of each shape."""
    adapters: int = 10
    """mining: adapters N of the attribute."""
    k: int = 16
    """mining: rank of the subspace."""
    iterations: int = 20
    """mining: IRLS iterations, none saved by convergence."""
    dense: int = 3
    """mining: matrices of each shape that also take the dense route; 0: skip it."""
    sweep: bool = False
    """mining: instead, show how the time grows with layers, N and r."""

    def __post_init__(self) -> None:
        for name in ("views", "cores"):
            values = getattr(self, name)
            require(len(values) > 0 and min(values) >= 1, name, "one or more sizes of at least 1", values)
        require(max(self.cores) <= 1024, "cores", "at most 1024, the width of VGGT-1B", self.cores)
        require(len(self.shapes) > 0, "shapes", "at least one shape", self.shapes)
        for name in ("rank", "layers", "adapters", "k", "iterations"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("rounds", "dense"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))

    def rounds_on(self, device: str) -> int:
        return self.rounds or (30 if device == "cuda" else 7)


@dataclass(frozen=True)
class DemoConfig:
    """Run the whole method at nano scale: render, adapt, mine, analyze, fine-tune, evaluate, report."""

    out: Path = Path("runs/demo")
    """Run folder; a run that was cut off continues in it."""
    smoke: bool = False
    """The least that still runs every stage, in about a minute; its numbers mean nothing."""
    seed: int = 0
    """Root seed."""
