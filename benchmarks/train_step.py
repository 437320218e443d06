"""How long a training step takes on one CPU core, against transformers, its Trainer with DeepSpeed, and bare modules.

    python -m benchmarks.train_step

Four ways to train one Llama on the same tokens from the same weights, each in a process of its own with one thread:
- llmscale: `llmscale.training.engine.Engine` under ZeRO-1, put together as `llmscale pretrain` does;
- transformers: LlamaForCausalLM (sdpa) in a bare loop;
- trainer: the same model in transformers' Trainer with DeepSpeed ZeRO-1;
- modules: llmscale's own Stage in the bare loop, no DeepSpeed and no schedule.

All clip at norm 1 and step torch's fused AdamW over fp32 weights. In bf16 all compute with bf16 weights beside fp32
master weights; llmscale accumulates and reduces gradients in fp32, Trainer's DeepSpeed in bf16, and the bare loop
turns its bf16 gradients into fp32 once (one micro-batch, nothing to accumulate).

The processes take turns, step by step, in an order that rotates, so that a slow moment of the machine meets all of
them; the ratio is the median of the rounds' ratios. The losses of the first step must agree. Prints a table, and
writes the raw times to benchmarks/results/train_step-<date>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch.optim import AdamW

from benchmarks.record import record
from llmscale.config.schema import RunConfig
from llmscale.distributed.groups import Groups
from llmscale.distributed.layout import Layout
from llmscale.models.family import families
from llmscale.models.stage import Stage

SEED = 1
WARM_UP = 2
"""Rounds that are not counted: allocations, lazy initialisation."""
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
"""How far the losses of the first step may be apart, relatively."""
PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers", "accelerate")

Step = Callable[[int], float]
"""Does training step number n, counted from 0, and returns its loss."""


def run_config(options: argparse.Namespace, precision: str) -> RunConfig:
    sections: dict[str, Any] = {
        "run": {"seed": SEED},
        "model": {
            "family": "llama",
            "num_layers": options.layers,
            "hidden_size": options.hidden,
            "num_attention_heads": options.hidden // 64,
            "vocab_size": options.vocab,
            "max_position_embeddings": options.sequence,
        },
        "data": {"train": [{"path": "none"}], "sequence_length": options.sequence},
        "training": {
            "steps": options.rounds + WARM_UP,
            "global_batch_size": options.batch,
            "micro_batch_size": options.batch,
            "precision": precision,
        },
        "deepspeed": "zero1.json",
    }
    return RunConfig.model_validate(sections)


class Tokens:
    """Random tokens, as the stream gives them."""

    def __init__(self, config: RunConfig) -> None:
        count = config.training.steps * config.training.global_batch_size
        shape = (count, config.data.sequence_length + 1)
        vocab_size = config.model.vocab_size or 0
        self.tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(SEED))
        self.batch = config.training.global_batch_size

    def rows(self, number: int) -> Any:
        """What the stream gives for a step, int64 [batch, sequence + 1]."""
        return self.tokens[number * self.batch : (number + 1) * self.batch].numpy()

    def step(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels of a step, int64 [batch, sequence]."""
        rows = self.tokens[number * self.batch : (number + 1) * self.batch]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@contextlib.contextmanager
def megatron(config: RunConfig) -> Iterator[Groups]:
    from llmscale.distributed import cpu, launch
    from llmscale.distributed.groups import form_groups
    from llmscale.training.engine import quiet_deepspeed

    this = launch.Launch.from_environment({})
    launch.start(this, torch.device("cpu"))
    cpu.redirect()
    quiet_deepspeed()
    with form_groups(Layout.of(config, 1, 1), SEED) as groups:
        yield groups
    launch.stop()


def stages(config: RunConfig, groups: Groups) -> list[Stage]:
    from llmscale.models.stage import build_stages

    return build_stages(config.model, families()["llama"], config.training, groups, SEED)


@contextlib.contextmanager
def llmscale(config: RunConfig) -> Iterator[tuple[Step, int]]:
    from llmscale.config.deepspeed import resolve
    from llmscale.training.batches import micro_batches
    from llmscale.training.engine import Engine
    from llmscale.training.optimizer import build_optimizer

    tokens, cpu = Tokens(config), torch.device("cpu")
    with megatron(config) as groups:
        engine = Engine(
            stages(config, groups),
            groups,
            resolve(config, None).settings,
            lambda parts: build_optimizer(config.optimizer, parts, cpu, False),
            config.optimizer.weight_decay,
            config.training.gradient_clipping,
        )

        def step(number: int) -> float:
            engine.set_learning_rate(config.optimizer.lr)
            return engine.train_step(micro_batches(tokens.rows(number), config.training.micro_batch_size, cpu)).loss

        yield step, sum(p.numel() for stage in engine.stages for p in stage.parameters())
        engine.close()


@contextlib.contextmanager
def modules(config: RunConfig) -> Iterator[tuple[Step, int]]:
    with megatron(config) as groups:
        stage = stages(config, groups)[0]
        yield bare_loop(config, stage, lambda tokens, labels: stage(tokens, labels).mean())


@contextlib.contextmanager
def transformers(config: RunConfig) -> Iterator[tuple[Step, int]]:
    model = huggingface(config)
    if config.training.precision == "bf16":
        model = model.bfloat16()

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Labels that are shifted already: transformers' own shift would drop the last token.
        result: torch.Tensor = model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss
        return result

    yield bare_loop(config, model, loss)


def bare_loop(
    config: RunConfig, model: torch.nn.Module, loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[Step, int]:
    """The loop one would write by hand: fp32 masters where the weights are bf16."""
    weights, tokens = list(model.parameters()), Tokens(config)
    bf16 = config.training.precision == "bf16"
    masters = [torch.nn.Parameter(w.detach().float()) for w in weights] if bf16 else weights
    settings = config.optimizer
    groups = [
        {"params": [m for m in masters if m.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [m for m in masters if m.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    model.train()

    def step(number: int) -> float:
        loss = loss_of(*tokens.step(number))
        loss.backward()
        if bf16:
            for weight, master in zip(weights, masters, strict=True):
                if weight.grad is not None:
                    master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, config.training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if bf16:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        return loss.item()

    return step, sum(w.numel() for w in weights)


def huggingface(config: RunConfig) -> Any:
    """transformers' LlamaForCausalLM with llmscale's initial weights, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmscale.models.init import initial_tensor

    sizes, family = config.model, families()["llama"]
    ours = {
        w.name: initial_tensor(w, sizes, SEED, torch.device("cpu"))
        for w in family.parameters(sizes, sizes.vocab_size or 0)
    }
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    for layer in range(sizes.num_layers):
        here, there = f"decoder.layers.{layer}", f"model.layers.{layer}"
        # Rows of linear_qkv go head by head: its query, its key, its value.
        qkv = ours[f"{here}.self_attention.linear_qkv.weight"]
        heads = qkv.view(sizes.num_attention_heads, 3, sizes.head_size, sizes.hidden_size)
        for index, name in enumerate("qkv"):
            theirs[f"{there}.self_attn.{name}_proj.weight"] = heads[:, index].reshape(-1, sizes.hidden_size)
        gate, up = ours[f"{here}.mlp.linear_fc1.weight"].chunk(2)
        theirs |= {
            f"{there}.self_attn.o_proj.weight": ours[f"{here}.self_attention.linear_proj.weight"],
            f"{there}.mlp.gate_proj.weight": gate,
            f"{there}.mlp.up_proj.weight": up,
            f"{there}.mlp.down_proj.weight": ours[f"{here}.mlp.linear_fc2.weight"],
            f"{there}.input_layernorm.weight": ours[f"{here}.input_layernorm.weight"],
            f"{there}.post_attention_layernorm.weight": ours[f"{here}.pre_mlp_layernorm.weight"],
        }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=family.ffn_hidden_size(sizes),
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_attention_heads,
            max_position_embeddings=sizes.max_position_embeddings,
            rms_norm_eps=sizes.norm_eps,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    model.load_state_dict(theirs)
    return model


def serve_trainer(config: RunConfig, pipe: Connection) -> None:
    """transformers' Trainer runs its own loop; it is stopped between steps, in its callback."""
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20_000 + os.getpid() % 20_000),
    }
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from llmscale.training.engine import quiet_deepspeed

    quiet_deepspeed()  # as llmscale's engine: not to wait for a compiler
    tokens, training, settings = Tokens(config), config.training, config.optimizer
    losses: list[torch.Tensor] = []
    clock = Clock(pipe)

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.ready(sum(p.numel() for p in model.parameters()))
            clock.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.done(losses[-1].item())
            clock.wait()

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    rows = [{"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in tokens.tokens]
    bf16 = training.precision == "bf16"
    with tempfile.TemporaryDirectory() as folder:
        model = huggingface(config)
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=bf16,
            max_steps=training.steps,
            per_device_train_batch_size=training.micro_batch_size,
            optim="adamw_torch_fused",
            learning_rate=settings.lr,
            lr_scheduler_type="constant",
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_epsilon=settings.eps,
            weight_decay=settings.weight_decay,
            max_grad_norm=training.gradient_clipping,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            deepspeed={
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "bf16": {"enabled": bf16},
                "zero_optimization": {"stage": 1},
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 2**31,
            },
        )
        InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[Turns()]).train()


class Clock:
    """Of a contender's process: waits for its turn, takes the time, reports."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def ready(self, parameters: int) -> None:
        self.pipe.send(parameters)

    def wait(self) -> None:
        """Until the next turn; ends the process after the last one."""
        if not self.pipe.recv():
            # Trainer's and DeepSpeed's ways out are not what is measured.
            os._exit(0)
        self.began = time.perf_counter(), time.process_time()

    def done(self, loss: float) -> None:
        self.pipe.send((time.perf_counter() - self.began[0], time.process_time() - self.began[1], loss))


CONTENDERS: dict[str, Callable[[RunConfig], contextlib.AbstractContextManager[tuple[Step, int]]] | None] = {
    "llmscale": llmscale,
    "transformers": transformers,
    "trainer": None,
    "modules": modules,
}


def serve(name: str, config: RunConfig, pipe: Connection) -> None:
    """A contender's process."""
    torch.set_num_threads(1)
    contender = CONTENDERS[name]
    if contender is None:
        serve_trainer(config, pipe)
        return
    clock = Clock(pipe)
    with contender(config) as (step, parameters):
        clock.ready(parameters)
        for number in range(config.training.steps):
            clock.wait()
            clock.done(step(number))
        clock.wait()


def measure(names: list[str], config: RunConfig) -> dict[str, Any]:
    """Let the contenders take turns. Gives the parameter count, and per contender wall and CPU seconds and losses."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    counts = {}
    for name in names:
        pipes[name], other = context.Pipe()
        context.Process(target=serve, args=(name, config, other), daemon=True).start()
        other.close()
        counts[name] = pipes[name].recv()
    if len(set(counts.values())) != 1:
        raise SystemExit(f"the models differ in their number of parameters: {counts}")
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": [], "loss": []} for name in names}
    for step in range(config.training.steps):
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            pipes[name].send(True)
            for key, value in zip(("wall", "cpu", "loss"), pipes[name].recv(), strict=True):
                found[name][key].append(value)
        print(f"step {step + 1}/{config.training.steps}", end="\r", file=sys.stderr, flush=True)
    for pipe in pipes.values():
        pipe.send(False)
    first = [found[name]["loss"][0] for name in names]
    if max(first) - min(first) > TOLERANCE[config.training.precision] * min(first):
        raise SystemExit(f"the losses of the first step differ: {dict(zip(names, first, strict=True))}")
    return {"parameters": counts[names[0]], "times": found}


def ratios(times: dict[str, dict[str, list[float]]], base: str, other: str, clock: str) -> list[float]:
    pairs = zip(times[base][clock][WARM_UP:], times[other][clock][WARM_UP:], strict=True)
    return [mine / theirs for mine, theirs in pairs]


def table(results: dict[str, Any], names: list[str], tokens: int) -> str:
    lines = [
        "| precision | contender | step, s (median) | tokens/s | llmscale / it (quartiles) | in CPU time |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for precision, result in results.items():
        times = result["times"]
        for name in names:
            median = statistics.median(times[name]["wall"][WARM_UP:])
            shown = ["", ""]
            if name != names[0]:
                wall = ratios(times, names[0], name, "wall")
                low, middle, high = statistics.quantiles(wall, n=4) if len(wall) > 1 else wall * 3
                cpu = statistics.median(ratios(times, names[0], name, "cpu"))
                shown = [f"{middle:.3f} ({low:.3f} – {high:.3f})", f"{cpu:.3f}"]
            lines.append(f"| {precision} | {name} | {median:.3f} | {tokens / median:.0f} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=9, help=f"counted steps of each contender, after {WARM_UP} more")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/train_step-<date>.json")
    options = parser.parse_args()
    results = {p: measure(options.contenders, run_config(options, p)) for p in options.precision}
    counts = {result["parameters"] for result in results.values()}
    print(f"{counts.pop() / 1e6:.1f}M parameters, {options.batch} × {options.sequence} tokens a step, 1 thread")
    print(table(results, options.contenders, options.batch * options.sequence))
    raw = {"warm_up_rounds": WARM_UP, "precisions": results}
    print(record("train_step", raw, PACKAGES, options.output))


if __name__ == "__main__":
    main()
