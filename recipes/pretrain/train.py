"""Pre-train small Llamas and watch their pivots form.

    python prepare.py --out DATA texts…
    python train.py --data DATA --eval TEXT --out RUNS configs/pivot.json [configs/control.json …]

Started again with the same arguments, a run goes on from its last checkpoint as if it had never stopped:
the data order depends on the seed and the step number alone, the checkpoint holds the optimizer, and the log
forgets what the checkpoint does not know. On a CPU the losses are bit-identical.

On a GPU a whole step (gather, forward, backward, clip, AdamW) is captured as a CUDA graph, and what changes
between steps (where the windows start, the learning rate) is read from device memory: to launch the kernels
of so small a model one by one would take longer than to run them. Several settings train side by side, each
on a CUDA stream of its own, and share one compilation. What this gives up: anything in the step that depends
on values, such as skipping a step whose gradient is infinite.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from attention import SIGMOID, SOFTMAX_PLUS_ONE, register_attentions
from corpus import load_tokens, text_windows, window_starts, with_bos
from pivots import measure, punctuation_ids
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

EAGER_STEPS = 3  # before a step is captured: they compile, and let the libraries allocate what they keep
# What may change between two sittings of a run: when it ends, and what it reports.
MAY_CHANGE = {"steps", "decay", "log_every", "measure_every", "checkpoint_seconds"}


@dataclass(frozen=True)
class Settings:
    """What a run is made of: the model's shape, the schedule, AdamW, and how often to report."""

    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 12
    heads: int = 4
    kv_heads: int = 2
    tied: bool = True
    attention: str = "sdpa"
    context: int = 512
    positions: int = 1024
    batch: int = 16
    steps: int = 10_000
    warmup: int = 200
    decay: float = 0.2  # the last share of the steps, over which the learning rate falls to zero
    lr: float = 5e-3
    weight_decay: float = 0.1
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    seed: int = 0
    compile: bool = True
    log_every: int = 100
    measure_every: int = 1000
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.attention not in (known := ("sdpa", SIGMOID, SOFTMAX_PLUS_ONE)):
            raise ValueError(f"attention={self.attention!r} is unknown; use one of {', '.join(known)}")
        if self.context > self.positions:
            raise ValueError(f"context={self.context} exceeds positions={self.positions}; raise positions")
        if not 0 < self.warmup <= self.steps * (1 - self.decay):
            raise ValueError(f"warmup={self.warmup} runs into the decay of steps={self.steps}; shorten it")
        if self.measure_every % self.log_every:
            raise ValueError(f"log_every={self.log_every} must divide measure_every={self.measure_every}")

    def lr_at(self, step: int) -> float:
        """Warm up, stay, decay: linear, constant, linear."""
        left = (self.steps - step) / max(1, self.steps * self.decay)
        return self.lr * min(1, (step + 1) / self.warmup, left)


@dataclass(frozen=True)
class Material:
    """What all runs read: the training stream, the tokenizer, and the evaluation text in tokens."""

    tokens: Tensor
    tokenizer: PreTrainedTokenizerBase
    evaluation: str
    device: torch.device


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return a fresh Llama, initialised from the seed.

    No `pad_token_id`: it is `</s>`, and torch gives a padding token's embedding no gradient.
    """
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=settings.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        attn_implementation=settings.attention,
    )
    return LlamaForCausalLM(config)


def run_block(layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One decoder block without mask or cache: (batch, token, hidden) in and out, causal by construction."""
    return layer(hidden, position_embeddings=(cos, sin))


def head_loss(norm: nn.Module, head: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in float32 of the predictions from the last block's output."""
    logits = F.linear(norm(hidden), head)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def adamw(model: nn.Module, settings: Settings, device: torch.device) -> torch.optim.AdamW:
    """AdamW that decays matrices only, with its learning rate in device memory, where a graph can read it."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": some, "weight_decay": decay, "lr": torch.zeros((), device=device)}
        for some, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
    ]
    return torch.optim.AdamW(
        groups, betas=(0.9, settings.beta2), eps=settings.eps, fused=True, capturable=device.type == "cuda"
    )


class Run:
    """One model in training, with all that its steps touch."""

    def __init__(self, settings: Settings, folder: Path, material: Material) -> None:
        self.settings, self.folder, self.material = settings, folder, material
        device = material.device
        self.name, self.step, self.diverged = folder.name, 0, False
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.done = torch.cuda.Event() if self.stream else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_steps = 0
        self.model = build_model(settings, material.tokenizer).to(device)
        self.optimizer = adamw(self.model, settings, device)
        compiled: Callable = torch.compile if settings.compile else lambda function, **_: function
        self.run_block = compiled(run_block, dynamic=False)  # one compilation serves all layers and all runs
        self.head_loss = compiled(head_loss, dynamic=False)
        tokenizer = material.tokenizer
        windows, self.bytes_per_token = text_windows(material.evaluation, tokenizer, settings.context)
        self.windows = windows.to(device)
        self.punctuation = punctuation_ids(tokenizer)

        self.within = torch.arange(settings.context, device=device)  # a window's positions, from its start
        self.rotary = self.model.model.rotary_emb(torch.zeros(1, device=device), self.within[None])
        self.starts = torch.zeros(settings.batch, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.losses = torch.zeros(settings.log_every, device=device)
        self.count = 0  # steps of the stretch under way

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
        self._resume()
        self.began = self.saved_at = time.monotonic()
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())

    def _update(self) -> None:
        """Take one optimizer step on the windows that begin at `self.starts`."""
        self.optimizer.zero_grad(set_to_none=True)
        targets = self.material.tokens[self.starts[:, None] + self.within].long()  # (batch, token)
        with torch.autocast(self.material.device.type, dtype=torch.bfloat16):
            hidden = self.model.model.embed_tokens(with_bos(targets, self.model.config.bos_token_id))
            for layer in self.model.model.layers:
                hidden = self.run_block(layer, hidden, *self.rotary)
            loss = self.head_loss(self.model.model.norm, self.model.lm_head.weight, hidden, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _advance(self) -> None:
        """Take one step: eagerly at first and on a CPU, then by replaying the captured one."""
        if self.graph is not None:
            self.graph.replay()
            return
        self._update()
        self.eager_steps += 1
        if self.stream and self.eager_steps == EAGER_STEPS:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self._update()

    def _on_stream(self) -> AbstractContextManager:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def launch(self) -> None:
        """Queue the steps up to the next log line; on a GPU this returns long before they are done."""
        s, device = self.settings, self.material.device
        self.count = min(s.log_every - self.step % s.log_every, s.steps - self.step)
        starts = window_starts(
            self.step * s.batch,
            self.count * s.batch,
            tokens=len(self.material.tokens),
            context=s.context,
            seed=s.seed,
        ).view(self.count, s.batch)
        rates = torch.tensor([s.lr_at(self.step + i) for i in range(self.count)])
        with self._on_stream():
            starts, rates = starts.to(device), rates.to(device)
            for i in range(self.count):
                self.starts.copy_(starts[i])
                for group in self.optimizer.param_groups:
                    group["lr"].copy_(rates[i])
                self._advance()
                self.losses[i].copy_(self.loss)
            if self.done:
                self.done.record()

    def ready(self) -> bool:
        """Whether the queued steps are done."""
        return self.done is None or self.done.query()

    def finish(self) -> None:
        """Log the stretch that is done; measure and checkpoint when it is time."""
        s = self.settings
        with self._on_stream():
            losses = self.losses[: self.count].tolist()
            self.step += self.count
            self.diverged = not math.isfinite(sum(losses))
            record: dict[str, object] = {
                "step": self.step,
                "tokens": self.step * s.batch * s.context,
                "seconds": round(time.monotonic() - self.began, 2),
                "lr": s.lr_at(self.step - 1),
                "loss": sum(losses) / len(losses),
            }
            if (self.step % s.measure_every == 0 or self.step == s.steps) and not self.diverged:
                record |= self.evaluate(windows=128 if self.step < s.steps else len(self.windows))
                record |= measure(self.model, self.windows[:16], self.punctuation)
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self.over() or time.monotonic() - self.saved_at > s.checkpoint_seconds:
                self.save()
        mass = f"  [BOS] {max(record['ratio']):.1f}x {max(record['mass']):.3f}" if "mass" in record else ""
        print(f"{self.name} {self.step} loss {record['loss']:.4f}{mass}", flush=True)

    def over(self) -> bool:
        """Whether there is nothing left to train."""
        return self.diverged or self.step >= self.settings.steps

    @torch.no_grad()
    def evaluate(self, *, windows: int) -> dict[str, float]:
        """Return the loss on evenly spaced evaluation windows, in nats per token and bits per byte."""
        spaced = torch.linspace(0, len(self.windows) - 1, min(windows, len(self.windows))).long()
        chosen, total = self.windows[spaced.to(self.windows.device)], 0.0
        with torch.autocast(self.material.device.type, dtype=torch.bfloat16):
            for targets in chosen.split(32):
                ids = with_bos(targets, self.model.config.bos_token_id)
                logits = self.model(ids, use_cache=False).logits.flatten(0, 1).float()
                total += float(F.cross_entropy(logits, targets.flatten(), reduction="sum"))
        nats = total / chosen.numel()
        return {"val_loss": nats, "val_bits_per_byte": nats / math.log(2) / self.bytes_per_token}

    def save(self) -> None:
        """Write the checkpoint beside the old one, then over it: a kill leaves one of the two."""
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.folder / "checkpoint.pt.partial"
        torch.save(state, partial)
        partial.replace(self.folder / "checkpoint.pt")
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        """Take up the checkpoint, if there is one, and forget the log lines after it."""
        log, checkpoint = self.folder / "log.jsonl", self.folder / "checkpoint.pt"
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location=self.material.device, weights_only=True)
            new = asdict(self.settings)
            changed = {name for name, value in state["settings"].items() if new[name] != value} - MAY_CHANGE
            if changed:
                names = ", ".join(sorted(changed))
                raise ValueError(f"{checkpoint} was made with another {names}; use another --out")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        known = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
        log.write_text("".join(known))


def train(runs: list[Run], *, seconds: float) -> None:
    """Advance all runs, whichever is ready, until they are over or the sitting's time is."""
    deadline = time.monotonic() + seconds
    runs = [run for run in runs if not run.over()]
    for run in runs:
        run.launch()
    while runs:
        for run in [run for run in runs if run.ready()]:
            run.finish()
            late = time.monotonic() > deadline
            if late and not run.over():
                run.save()
            if late or run.over():
                runs.remove(run)
            else:
                run.launch()
        time.sleep(0.001 if runs and runs[0].stream else 0)


def main() -> None:
    """Train one run for every settings file, in a folder of its name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="+", type=Path, help="JSON files of Settings")
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--eval", type=Path, required=True, help="text for validation loss and pivot table")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this, to go on later")
    args = parser.parse_args()

    register_attentions()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    material = Material(
        tokens=load_tokens(args.data / "tokens.u16", device),
        tokenizer=AutoTokenizer.from_pretrained(args.data / "tokenizer"),
        evaluation=args.eval.read_text(encoding="utf-8"),
        device=device,
    )
    settings = {file.stem: Settings(**json.loads(file.read_text())) for file in args.settings}
    train([Run(s, args.out / name, material) for name, s in settings.items()], seconds=args.seconds)


if __name__ == "__main__":
    main()
