"""The model card of an export: what it is, what it has seen, how it was made, and whether it was proven."""

from __future__ import annotations

from typing import Any

from llmscale.checkpoint.format import Checkpoint
from llmscale.convert.parity import Parity
from llmscale.models.family import families


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the checkpoint says of itself."""
    manifest = checkpoint.manifest
    data = manifest.get("data") or {}
    return {
        "name": checkpoint.path.name,
        "run": (manifest["config"].get("run") or {}).get("name"),
        "step": checkpoint.step,
        "tokens": manifest["tokens"],
        "layout": manifest["layout"],
        "versions": manifest["versions"],
        "sources": [
            {key: source[key] for key in ("path", "weight", "sequences", "fingerprint")}
            for source in data.get("sources", [])
        ],
        "imported": manifest.get("imported"),
    }


def text(checkpoint: Checkpoint, architecture: str, dtype: str, parity: Parity | None) -> str:
    """The README.md of an export."""
    model, about = checkpoint.model, facts(checkpoint)
    family = families()[model.family]
    parameters = sum(weight.numel for weight in checkpoint.weights.values())
    rows = [
        ("architecture", architecture),
        ("parameters", f"{parameters:,}, {dtype}"),
        ("layers", model.num_layers),
        ("hidden size", model.hidden_size),
        ("heads", f"{model.num_attention_heads} of {model.head_size}, {model.query_groups} of key and value"),
        ("MLP width", family.ffn_hidden_size(model)),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("longest sequence", f"{model.max_position_embeddings:,}"),
        ("trained on", f"{about['tokens']:,} tokens, {about['step']:,} steps"),
        ("layout of the training", ", ".join(f"{key} {value}" for key, value in about["layout"].items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in about["versions"].items())),
    ]
    if about["imported"]:
        rows.append(("imported from", "folder {folder}, architecture {architecture}".format(**about["imported"])))
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [llmscale]", "---", ""]
    lines += [f"# {about['run'] or checkpoint.path.name}", "", _proof(parity), "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    if about["sources"]:
        lines += ["", "## Data", "", "| source | weight | sequences read | fingerprint |", "|---|---:|---:|---|"]
        lines += [
            f"| {source['path']} | {source['weight']:g} | {source['sequences']:,} | `{source['fingerprint'][:16]}` |"
            for source in about["sources"]
        ]
    return "\n".join(lines) + "\n"


def _proof(parity: Parity | None) -> str:
    if parity is None:
        return "**Not verified**: written with `--no-verify`, so nobody has compared its logits with the checkpoint's."
    rows = "are" if parity.same_embeddings else "are NOT"
    what = (
        f"logits of transformers and of llmscale differ by at most {parity.difference:.1e} (largest logit "
        f"{parity.largest:.3g}, tolerance {parity.tolerance:.0e}) on {parity.sequences} × {parity.length} random "
        f"tokens, seed {parity.seed}, in fp32; the embeddings {rows} the same, row by row."
    )
    return f"Verified: {what}" if parity.equal else f"**FAILED its verification, do not use it**: {what}"
