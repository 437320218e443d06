"""The run's config as types: every key, its default, its range and what it means.

One frozen model a section. The descriptions below are the config reference: `docs/config.md` is generated from them.
Rules that tie several sections together stand elsewhere: sizes and layouts in `distributed/rules.py`,
values that follow from others in `derive.py`, DeepSpeed's file in `deepspeed.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

from llmscale.config.section import Bool, Float, Int, Section, number
from llmscale.config.slurm import Slurm


class Run(Section):
    """What the run is called and where it writes."""

    name: str = Field("run", min_length=1, description="Name of the run, shown in logs and trackers.")
    output_dir: str = Field("runs/run", min_length=1, description="The run directory; made when it does not exist.")
    seed: Annotated[int, BeforeValidator(number)] = Field(
        1234, ge=0, lt=2**63, description="Seed of the initial weights, the data order and dropout."
    )


class RopeScaling(Section):
    """Llama 3's stretch of low rotary frequencies (`rope_type: llama3` in Hugging Face's format)."""

    factor: Float = Field(ge=1.0, description="By how much long wavelengths are stretched.", examples=[8.0])
    low_freq_factor: Float = Field(
        1.0, gt=0.0, description="Wavelengths above original_max_position_embeddings / this are stretched in full."
    )
    high_freq_factor: Float = Field(
        4.0,
        validate_default=True,
        description="Wavelengths below original_max_position_embeddings / this stay; above low_freq_factor.",
    )
    original_max_position_embeddings: Int = Field(8192, ge=1, description="Longest sequence before the stretch.")

    @field_validator("high_freq_factor")
    @classmethod
    def _above_low(cls, value: float, info: ValidationInfo) -> float:
        if value <= (low := info.data.get("low_freq_factor", 0.0)):
            raise PydanticKnownError("greater_than", {"gt": low})
        return value


class Model(Section):
    """The model's architecture. `preset` fills in what is not given."""

    preset: str | None = Field(
        None,
        description="Name of a preset to start from, or a YAML file with keys of this section, beside the config or in "
        "the working folder; keys given beside it win.",
    )
    family: str = Field(
        description="Model family: gemma, gpt2, gpt_neox, llama, mistral, qwen2 or qwen3; see docs/models.md.",
        examples=["llama"],
    )
    num_layers: Int = Field(ge=1, description="Number of Transformer layers.", examples=[16])
    hidden_size: Int = Field(ge=1, description="Width of the residual stream.", examples=[2048])
    num_attention_heads: Int = Field(ge=1, description="Number of query heads.", examples=[32])
    num_query_groups: Int | None = Field(
        None, ge=1, description="Number of key/value heads (GQA); the number of heads when null."
    )
    head_dim: Int | None = Field(
        None, ge=1, description="Size of one head; hidden_size / num_attention_heads when null."
    )
    ffn_hidden_size: Int | None = Field(
        None,
        ge=1,
        description="Width of the MLP; when null 4 × hidden_size, or for SwiGLU 8/3 × hidden_size, "
        "rounded up to a multiple of 256.",
    )
    vocab_size: Int | None = Field(
        None,
        ge=2,
        description="Number of token ids; the data's tokenizer decides when null. "
        "Padded inside; the padding is never seen in the loss.",
    )
    max_position_embeddings: Int = Field(2048, ge=1, description="Longest sequence that the model is made for.")
    tie_embeddings: Bool | None = Field(
        None, description="Share the embedding with the output layer; the family decides when null."
    )
    dropout: Float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on embeddings, attention and residuals.")
    norm_eps: Float = Field(1e-5, gt=0.0, description="Epsilon of the norms.")
    rope_theta: Float = Field(10000.0, gt=0.0, description="Base of the rotary position embedding.")
    rope_scaling: RopeScaling | None = Field(
        None,
        description="Llama 3's stretch of the rotary positions: {factor, low_freq_factor, high_freq_factor, "
        "original_max_position_embeddings}.",
        examples=[{"factor": 8.0, "original_max_position_embeddings": 8192}],
    )
    rotary_fraction: Float = Field(
        1.0, gt=0.0, le=1.0, description="Share of each head that the rotary positions turn; 0.25 in Pythia."
    )
    init_std: Float = Field(
        0.02,
        gt=0.0,
        description="Standard deviation of initial weights; what writes into the residual stream gets it "
        "divided by sqrt(2 × num_layers).",
    )

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups if self.num_query_groups is not None else self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Size of one head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads


class DataSource(Section):
    """One source of sequences."""

    path: str = Field(
        min_length=1,
        description="What `llmscale data build` wrote, or `llmscale data describe` for text: a folder, any fsspec URL "
        "(s3://bucket/train, hf://…), or `pipe:` and a command with {name} for the file's name. A pattern of folders "
        "(data/part-*/train) stands for all of them, each with a share of the weight by its tokens.",
        examples=["data/train"],
    )
    weight: Float = Field(1.0, gt=0.0, description="Share of the sequences, relative to the other sources.")
    format: Literal["tokens", "text"] | None = Field(
        None,
        description="tokens: token shards. text: raw-text shards, tokenised while they stream. When null, as the "
        "folder's card.json says; a folder of the other kind is refused.",
    )


class Data(Section):
    """What the model reads."""

    train: tuple[DataSource, ...] = Field(
        min_length=1, description="Training sources.", examples=[[{"path": "data/train"}]]
    )
    validation: tuple[DataSource, ...] = Field((), description="Validation sources.")
    tokenizer: str | None = Field(
        None, description="Path of a tokenizer.json; the one beside the first training source when null."
    )
    sequence_length: Int = Field(ge=1, description="Tokens of one sequence that the model sees.", examples=[2048])
    mask_documents: Bool = Field(
        False,
        description="Keep attention inside a document, and count positions from its first token. "
        "The first token of the next document stays a label.",
    )
    shuffle_window: Int = Field(
        4096,
        ge=1,
        description="Samples of 2^18 tokens that are shuffled together; remote data needs two windows in the cache.",
    )
    cache: str | None = Field(
        None, description="Folder on each node for remote data; one below $TMPDIR when null. Ranks share it."
    )
    cache_gib: Float = Field(16.0, gt=0.0, description="Most that the cache takes, in GiB.")
    workers: Int = Field(2, ge=1, description="Threads of each rank that tokenise text shards.")
    verify: Literal["first", "never"] = Field(
        "first", description="Compare each sample with its checksum when a rank first reads of it, or never."
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="stop: a broken sample ends the run. skip: it is replaced by others of its window, the same on "
        "every rank, counted in the metrics, and written to OUTPUT_DIR/skipped.jsonl.",
    )
    max_skipped: Float = Field(0.001, ge=0.0, le=1.0, description="Share of a source that may be skipped; one always.")


class Parallel(Section):
    """How the model is cut; data parallelism takes the ranks that are left."""

    tensor: Int = Field(1, ge=1, description="Tensor-parallel size.")
    sequence_parallel: Bool = Field(
        False, description="Cut norms and dropout along the sequence inside the tensor-parallel group."
    )
    pipeline: Int = Field(1, ge=1, description="Number of pipeline stages.")
    virtual_pipeline: Int = Field(
        1, ge=1, description="Model chunks a pipeline rank holds: above 1 the schedule is the interleaved one."
    )
    stage_layers: tuple[Annotated[Int, Field(ge=0)], ...] | None = Field(
        None,
        description="Layers of each virtual stage in the order of the model (pipeline × virtual_pipeline numbers); "
        "as even as possible when null.",
    )
    context: Int = Field(1, ge=1, description="Context-parallel size. Not built yet: must be 1.")
    expert: Int = Field(1, ge=1, description="Expert-parallel size. Not built yet: must be 1.")


class Training(Section):
    """The loop."""

    steps: Int = Field(
        ge=0, description="Optimizer steps of the whole run; 0 writes the initial weights and stops.", examples=[1000]
    )
    global_batch_size: Int = Field(ge=1, description="Sequences of one optimizer step, over all ranks.", examples=[256])
    micro_batch_size: Int = Field(1, ge=1, description="Sequences of one forward pass of one rank.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="bf16: bf16 compute copy, fp32 master weights, fp32 gradient accumulation. fp32: all in fp32.",
    )
    gradient_clipping: Float = Field(
        1.0, ge=0.0, description="Largest global norm of the gradient (L2 over all ranks); 0 does not clip."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="Recompute nothing, the core attention, or whole layers in the backward pass."
    )
    validation_interval: Int = Field(0, ge=0, description="Validate every so many steps and at the end; 0 never.")
    validation_batches: Int = Field(8, ge=1, description="Global batches of one validation.")
    peak_tflops: Float | None = Field(
        None, gt=0.0, description="Dense peak of one device in TFLOP/s for the MFU; from the device's name when null."
    )


class Optimizer(Section):
    """The optimizer. Weight decay skips norms and biases."""

    name: Literal["adamw", "adam", "sgd", "lion"] = Field(
        "adamw", description="adamw; adam (L2 in place of decoupled decay); sgd with momentum betas[0]; lion."
    )
    lr: Float = Field(3e-4, gt=0.0, description="Peak learning rate.")
    betas: tuple[
        Annotated[Float, Field(ge=0.0, lt=1.0)],
        Annotated[Float, Field(ge=0.0, lt=1.0)],
    ] = Field((0.9, 0.95), description="Decay of the first and second moments.")
    eps: Float = Field(1e-8, gt=0.0, description="Epsilon of Adam's denominator.")
    weight_decay: Float = Field(0.1, ge=0.0, description="Weight decay of matrices and embeddings.")


class Schedule(Section):
    """The learning rate over the steps."""

    name: Literal["cosine", "linear", "wsd", "constant"] = Field("cosine", description="Shape after the warm-up.")
    warmup_steps: Int = Field(0, ge=0, description="Steps of linear warm-up from 0.")
    min_lr_ratio: Float = Field(0.1, ge=0.0, le=1.0, description="Last learning rate / peak.")
    decay_ratio: Float = Field(0.1, ge=0.0, le=1.0, description="Share of the steps in which wsd decays.")


class Checkpoint(Section):
    """Saving and resuming."""

    interval: Int = Field(0, ge=0, description="Save every so many steps, and at the end; 0 saves nothing.")
    keep: Int = Field(0, ge=0, description="Keep this many of the newest whole checkpoints; 0 keeps all.")
    resume: str = Field(
        "auto",
        min_length=1,
        description="auto: from the newest whole checkpoint of the run directory, if there is one; never; "
        "or the path of a checkpoint or a run, until the run has saved since.",
    )
    folder: str | None = Field(
        None,
        min_length=1,
        description="Where checkpoints are written: a folder, or any fsspec URL; OUTPUT_DIR/checkpoints when null.",
        examples=["s3://bucket/runs/mine"],
    )
    asynchronous: Bool = Field(
        True,
        description="Go on with training while a checkpoint is written; takes as much of the node's memory as the "
        "weights and optimizer state of its ranks have.",
    )
    on_error: Literal["stop", "continue"] = Field(
        "stop",
        description="What a failed save does: end the run, or be warned of, and tried again at the next interval. The "
        "last one always counts.",
    )
    start_from: str | None = Field(
        None,
        min_length=1,
        description="Checkpoint, or run directory, whose weights a new run begins with: an import by `llmscale convert "
        "from-hf`, or another run. Its optimizer state and data position stay behind.",
        examples=["imported"],
    )


class Logging(Section):
    """Where the figures go besides metrics.jsonl."""

    interval: Int = Field(1, ge=1, description="Write metrics every so many steps.")
    tensorboard: Bool = Field(True, description="Write OUTPUT_DIR/tensorboard/.")
    wandb: str | None = Field(
        None, description="Weights & Biases project; needs the package `wandb`. WANDB_MODE=offline works."
    )


class RunConfig(Section):
    """A whole run."""

    run: Run = Field(default_factory=Run)
    model: Model
    data: Data
    parallel: Parallel = Field(default_factory=Parallel)
    training: Training
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    deepspeed: str = Field(
        "zero1.json",
        min_length=1,
        description="DeepSpeed JSON: beside the config, in the working folder, or a packaged one.",
    )
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    logging: Logging = Field(default_factory=Logging)
    slurm: Slurm = Field(default_factory=Slurm)
