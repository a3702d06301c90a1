"""The main player: a Hugging Face model under DeepSpeed, and the few verbs that the learner's loop needs of it.

Plain class, one instance per rank; every method that touches weights is a collective (all ranks call it alike).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils.tensor_fragment import fragment_address

from spin_ray.config import LearnerConfig
from spin_ray.errors import BadInput
from spin_ray.exchange.adapters import AdapterFiles
from spin_ray.learner.adapter import Adapter, linear_layers
from spin_ray.learner.export import check_export_names, read_beside, write_model
from spin_ray.learner.loading import load_model
from spin_ray.learner.logps import PolicyLogps, body
from spin_ray.learner.meters import ModelFlops, peak_flops, peak_memory_gib, row_use
from spin_ray.learner.modes import checkpoint_activations, layers_of, quieten
from spin_ray.learner.names import FolderNames, Group
from spin_ray.learner.packing import pack, plan_micro_batches, row_tokens
from spin_ray.learner.proof import NUM_PARAMETERS, TOLERANCES, Facts, compare
from spin_ray.learner.quantized import adamw_8bit, plain, quantize, true_shape
from spin_ray.learner.recut import Shards, num_ranks, take_up
from spin_ray.learner.resting import Resting
from spin_ray.learner.sharded import read_in_shards
from spin_ray.losses import GENERATED, REAL, LikelihoodObjective, PairLogps, PairObjective
from spin_ray.placement import Hardware
from spin_ray.places import drop_left_build_locks
from spin_ray.records import NUM_ANSWERS, NUM_PARTS, Pair, Saved

_TAG = "state"
"""DeepSpeed's folder in a checkpoint's."""
_REMEDY = "put it back; or, if it is an iteration's progress, remove its folder to begin that iteration's training again"


class MainPlayer:
    """theta: trains on packed batches of pairs, scores, exports.

    Needs torch.distributed to be initialised. Raises BadInput for a model that the packed forward pass would get wrong.
    """

    def __init__(
        self, saved: Saved, config: LearnerConfig, hardware: Hardware, *, trust_remote_code: bool = False, chat_template: str = "",
        proof_pairs: Sequence[Pair] = (), quantized: bool = False,
    ):
        """`chat_template`: as in `load_tokenizer`. `proof_pairs`: on these `proof` is computed; no pairs, no proof. `quantized`: the
        base is held in 4 bits.
        """
        self._config, self._hardware, model_path = config, hardware, saved.model
        self.model_path = model_path
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(hardware.device, torch.cuda.current_device() if hardware.device == "cuda" else 0)
        # Without ZeRO or bf16, DeepSpeed steps the bare optimizer: it waits for no gradient, and reports no norm of it.
        self._bare = config.zero_stage == 0 and hardware.dtype == "float32"
        self._sharded = config.zero_stage == 3
        self._deepspeed_config = _deepspeed_config(config, hardware, clips_itself=self._bare)
        self._lm = self._load(model_path)
        check_export_names(self._lm, Path(model_path))  # the driver has said what is left out
        self._beside = read_beside(model_path, trust_remote_code=trust_remote_code, chat_template=chat_template) if self.rank == 0 else {}
        if quantized:
            quantize(self._lm, linear_layers(self._lm), self.device)
        self._adapter = Adapter(self._lm, Path(saved.adapter)) if saved.adapter else None
        if config.activation_checkpointing or self._lm.supports_gradient_checkpointing:
            self._lm.gradient_checkpointing_enable()  # _checkpoint decides, row by row
        self._flops, self._peak_flops = ModelFlops.of(self._lm), peak_flops(self.device, self._lm.dtype)
        policy = PolicyLogps(self._lm, chunk_elements=hardware.logits_elements, accumulate=self._bare)
        self.proof = self._prove(policy, proof_pairs) if proof_pairs and self._fits_whole() else None
        if config.compile:
            _compile_layers(self._lm)
        optimizer = _optimizer(config, self._trained().values())
        self._grad_norm = 0.0
        self._resting: Resting | None = None
        """While the device is somebody else's."""
        self._copies: dict[str, list[torch.Tensor]] = {}
        """This rank's part of other weights, by the names that they were kept under."""
        if self._bare:
            optimizer.register_step_pre_hook(self._clip)
        drop_left_build_locks()
        self._engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=self._deepspeed_config)
        if config.zero_stage == 0 and self.world_size == 1:
            self._engine.enable_backward_allreduce = False  # with itself; it would copy all gradients into one tensor
        quieten(policy)  # DeepSpeed asks no module for its mode
        if proof_pairs and not self.proof:
            self.proof = self._prove(policy, proof_pairs, num_parameters=0)

    def _load(self, model_path: str) -> Any:
        """The model of a folder: whole, or under ZeRO-3 this rank's shards, which is a collective."""
        dtype = getattr(torch, self._hardware.dtype)
        read = partial(load_model, model_path, dtype=dtype)
        return read_in_shards(read, self._deepspeed_config, dtype=dtype, device=self.device) if self._sharded else read()

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """Name in memory -> parameter, of all that is trained."""
        return {name: parameter for name, parameter in self._lm.named_parameters() if parameter.requires_grad}

    def _fits_whole(self) -> bool:
        """Whether the weights are whole, and the device has room for them and as much again for two passes over a few rows."""
        if self._sharded:
            return False
        size = sum(parameter.numel() * parameter.element_size() for parameter in self._lm.parameters())
        return self.device.type == "cpu" or 2 * size < torch.cuda.mem_get_info(self.device)[0]

    def _prove(self, policy: PolicyLogps, pairs: Sequence[Pair], num_parameters: int = NUM_PARAMETERS) -> Facts:
        """The packed row against plain transformers. Without gradients it also runs through a sharded engine, on all ranks alike."""
        if num_parameters:
            policy.to(self.device)
        facts = compare(policy, pairs, share_prompt=self._hardware.share_prompt, num_parameters=num_parameters)
        facts.check(TOLERANCES[self._lm.dtype], self.model_path)
        return facts

    def _checkpoint(self, longest_row: int) -> None:
        """Recompute activations in the next backward pass: always if so configured, and where a rank's row, a single pair
        longer than `pack_tokens`, would else set the memory of the run. All ranks alike: ZeRO-3 gathers weights again.
        """
        checkpoint_activations(self._lm, self._config.activation_checkpointing or longest_row > self._config.pack_tokens)

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._config.grad_clip or float("inf")))

    def wait_for_all_ranks(self) -> None:
        dist.barrier()

    def any_rank(self, *flags: bool) -> list[bool]:
        """Of each flag whether it is set on any rank; a collective."""
        found = torch.tensor(flags, dtype=torch.float32, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.bool().tolist()

    def begin_iteration(self) -> None:
        """Forget the optimizer's moments: as in the paper, every iteration is a fresh fine-tuning from theta_t."""
        for moment in self._moments():
            moment.zero_()
        for state in self._optimizer_states():
            if isinstance(state.get("step"), int):  # bitsandbytes'
                state["step"] = 0

    def _moments(self) -> list[torch.Tensor]:
        """The optimizer's state; of one in 8 bits without the code, which is the same for all."""
        return [
            value for state in self._optimizer_states() for name, value in state.items()
            if isinstance(value, torch.Tensor) and not name.startswith("qmap")
        ]

    def _optimizer_states(self) -> Iterable[dict[str, Any]]:
        """Of every tensor that is stepped."""
        optimizer = self._engine.optimizer
        while hasattr(optimizer, "optimizer"):  # ZeRO wraps the optimizer that holds the state
            optimizer = optimizer.optimizer
        return optimizer.state.values()

    def rest(self) -> None:
        """Free the GPU's memory. What an iteration begins without is forgotten: the optimizer's moments, and the copy of theta_t."""
        if self.device.type == "cuda":
            self._copies.pop("opponent", None)
            self._resting = Resting(self.device, self._moments())

    def wake(self) -> None:
        """Take the memory back, with all else that was in it."""
        if self._resting:
            self._resting.end()
            self._resting = None

    def step(
        self, pairs: Sequence[Pair], references: np.ndarray, *, objective: PairObjective | LikelihoodObjective, lr: float
    ) -> dict[str, Any]:
        """One optimizer step on a global batch; every rank passes the same pairs and trains on its share.

        `references` [num_pairs, 1 or 2, 3, 2] float64: log p of the parts of each answer (records.py) under theta_t, and theta_0, in nats.
        The gradient is that of the weighted sum of losses over the objective's normalizer, whatever the number of ranks and the packing.
        Returns the batch means of the objective's metrics, and `grad_norm` (before clipping), `num_tokens`, `mfu` (model
        FLOPs of the batch / (seconds × ranks × the device's peak), see meters.py), `peak_memory_gib` of this rank,
        `padding_share` and `pack_fill`.
        """
        begun = time.perf_counter()
        lengths, plan = self._plan(pairs)
        sums: dict[str, torch.Tensor] = {}
        weights = torch.tensor(objective.weights(pairs), device=self.device) * (self.world_size / objective.normalizer(pairs))
        for number, (indices, counts) in enumerate(self._own_micro_batches(lengths, plan)):
            self._checkpoint(max(sum(lengths[i] for i in rank[number]) for rank in plan))
            loss, metrics = objective(self._pair_logps([pairs[i] for i in indices], references[indices]))
            # Data parallelism averages over ranks, hence the factor world_size.
            self._engine.backward((loss * weights[indices]).sum() * counts)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value.sum(0) * counts
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        totals = torch.cat([value.flatten() for value in sums.values()]).to(torch.float64)
        dist.all_reduce(totals)
        parts = (totals / len(pairs)).split([value.numel() for value in sums.values()])
        means = {name: part.tolist() if sums[name].ndim else part.item() for name, part in zip(sums, parts, strict=True)}
        grad_norm = self._grad_norm if self._bare else self._engine.get_global_grad_norm()
        achieved = self._flops.step(pairs, share_prompt=self._hardware.share_prompt) / (time.perf_counter() - begun)
        return {
            **means, "grad_norm": float(grad_norm), "num_tokens": sum(lengths), "mfu": achieved / (self.world_size * self._peak_flops),
            "peak_memory_gib": peak_memory_gib(self.device), **row_use(plan, lengths, pack_tokens=self._config.pack_tokens),
        }

    def _plan(self, pairs: Sequence[Pair]) -> tuple[list[int], list[list[list[int]]]]:
        """Each pair's tokens in a row, and every rank's micro-batches as indices."""
        lengths = [row_tokens(pair, share_prompt=self._hardware.share_prompt) for pair in pairs]
        return lengths, plan_micro_batches(lengths, num_ranks=self.world_size, pack_tokens=self._config.pack_tokens)

    def _own_micro_batches(self, lengths: list[int], plan: list[list[list[int]]]) -> list[tuple[list[int], bool]]:
        """This rank's (indices, whether they count). An empty one still runs, on the shortest pair with weight 0: ZeRO's
        collectives need every rank.
        """
        shortest = lengths.index(min(lengths))
        return [(indices or [shortest], bool(indices)) for indices in plan[self.rank]]

    def _answer_sums(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Log p of the parts of each pair's answers, [num_pairs, 3, 2], in nats."""
        packed = pack(pairs, share_prompt=self._hardware.share_prompt).to(self.device)
        return packed.sums(self._engine(packed))

    def _pair_logps(self, pairs: Sequence[Pair], references: np.ndarray) -> PairLogps:
        policy = self._answer_sums(pairs)
        known = torch.tensor(references, dtype=policy.dtype, device=self.device)
        num_tokens = torch.tensor([[len(answer) for answer in pair.answers] for pair in pairs], device=self.device)
        return PairLogps(policy, known[:, 0], num_tokens, known[:, 1] if known.shape[1] > 1 else None)

    def keep_copy(self, name: str, saved: Saved | None = None) -> None:
        """Keep this rank's part of the present weights, or of those that lie somewhere, for `score(..., copy=name)`. A collective.

        Of all that is trained: with an adapter that alone. What lies somewhere is kept once; of the present ones the latest.
        """
        if saved is None:
            self._copies[name] = [tensor.detach().clone() for tensor in self._weight_storage()]
        elif name not in self._copies:
            self._copies[name] = self._lying_at(saved)

    def _lying_at(self, saved: Saved) -> list[torch.Tensor]:
        """This rank's part of weights on disk, in the order of those that are trained here."""
        if self._adapter:
            others = self._adapter.read(Path(saved.adapter))
            return [self._own_part(*each) for each in zip(self._trained().values(), others, strict=True)]
        parameters = dict(PolicyLogps(self._load(saved.model)).lm.named_parameters())
        return [tensor.detach().to(self.device) for tensor in self._held(parameters[name] for name in self._trained())]

    def _own_part(self, parameter: torch.nn.Parameter, other: torch.Tensor) -> torch.Tensor:
        """Of another tensor of the same shape what this rank holds of ours."""
        whole = other.detach().to(self.device)
        if not self._sharded:
            return whole
        size = parameter.ds_tensor.numel()  # DeepSpeed's shards: equal parts of the flat parameter, padded at its end
        padded = torch.nn.functional.pad(whole.flatten(), (0, size * self.world_size - whole.numel()))
        return padded[self.rank * size : (self.rank + 1) * size].clone()

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair], *, copy: str | None = None) -> np.ndarray:
        """References of pairs, [num_pairs, 3, 2] float64, in nats, as in `opponent_reference`: under the present weights or a copy.

        Every rank passes the same pairs, scores its share, and gets all of them.
        """
        sums = torch.zeros(len(pairs), NUM_ANSWERS, NUM_PARTS, dtype=torch.float64, device=self.device)
        with self._weights_of(copy) if copy else nullcontext():
            for indices, weighs in self._own_micro_batches(*self._plan(pairs)):
                if weighs:
                    sums[indices] = self._answer_sums([pairs[i] for i in indices]).to(torch.float64)
                else:
                    self._answer_sums([pairs[i] for i in indices])
        dist.all_reduce(sums)
        return sums.cpu().numpy()

    @contextmanager
    def _weights_of(self, copy: str) -> Iterator[None]:
        """While the body runs, the model computes with a copy: the tensors swap their memory, nothing is copied."""
        live = [tensor.data for tensor in self._weight_storage()]
        self._point_weights_at(self._copies[copy])
        try:
            yield
        finally:
            self._point_weights_at(live)

    def _point_weights_at(self, memory: Sequence[torch.Tensor]) -> None:
        if self._sharded:
            for parameter in self._trained().values():
                if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # small ones stay gathered: drop that copy
                    parameter.partition()
        for tensor, data in zip(self._weight_storage(), memory, strict=True):
            tensor.data = data

    def _weight_storage(self) -> list[torch.Tensor]:
        """The tensors that hold this rank's part of what is trained: whole parameters, or under ZeRO-3 their shards."""
        return self._held(self._trained().values())

    def _held(self, parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
        return [parameter.ds_tensor if self._sharded else parameter for parameter in parameters]

    @torch.no_grad()
    def token_logps(self, pairs: Sequence[Pair]) -> list[np.ndarray]:
        """Log-probs of every answer token, two arrays (real, generated) per pair, in nats; computed alike on every rank.

        Pairs share rows as in training, so a model that mixes up what lies in one row shows in the audit.
        """
        arrays: list[np.ndarray] = [np.empty(0, np.float32)] * (2 * len(pairs))
        lengths = [row_tokens(pair, share_prompt=self._hardware.share_prompt) for pair in pairs]
        [rows] = plan_micro_batches(lengths, num_ranks=1, pack_tokens=self._config.pack_tokens)
        for row in filter(None, rows):
            packed = pack([pairs[i] for i in row], share_prompt=self._hardware.share_prompt).to(self.device)
            logps, answer_of = self._engine(packed).float().cpu(), packed.answer_of.cpu()
            for place, i in enumerate(row):
                arrays[2 * i], arrays[2 * i + 1] = (logps[answer_of == NUM_ANSWERS * place + side].numpy() for side in (REAL, GENERATED))
        return arrays

    def weights(self, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """All weights and persistent buffers with the names and shapes of the model's folder, in buckets of about `bucket_bytes`,
        on the CPU; other ranks than 0 get empty lists. An adapter is merged into copies.

        Under ZeRO-3 a bucket is gathered when it is asked for, so no rank ever holds more than one in full. Its tensors may be
        the live weights: use or copy them before the next bucket.
        """
        names = FolderNames(self._lm)
        bucket: list[Group] = []
        size = 0
        for group in names.groups:
            bucket.append(group)
            size += sum(true_shape(tensor).numel() for tensor in names.of(group)) * self._lm.dtype.itemsize
            if size >= bucket_bytes:
                yield from self._gathered(names, bucket)
                bucket, size = [], 0
        if bucket:
            yield from self._gathered(names, bucket)

    def _gathered(self, names: FolderNames, bucket: list[Group]) -> Iterator[list[tuple[str, torch.Tensor]]]:
        own = [tensor for group in bucket for tensor in names.of(group)]
        adapters = [part for group in bucket for name in group.members for part in (self._adapter.of(name) if self._adapter else ())]
        with self._whole([tensor for tensor in [*own, *adapters] if isinstance(tensor, torch.nn.Parameter)]):
            yield [] if self.rank else [
                entry for group in bucket for entry in names.convert(group, [
                    self._merged(name, plain(tensor)).cpu() for name, tensor in zip(group.members, names.of(group), strict=True)
                ]).items()
            ]

    def _merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return self._adapter.merged(name, weight) if self._adapter else weight

    def _whole(self, parameters: list[torch.nn.Parameter]) -> Any:
        """While the body runs, every rank has these in full; the ranks enter and leave together."""
        return deepspeed.zero.GatheredParameters(parameters, enabled=self._sharded)

    def adapter_weights(self) -> AdapterFiles | None:
        """The adapter as its folder has it, on the CPU, live where it lies there; None on other ranks than 0, and without an adapter.
        A collective.
        """
        if self._adapter is None:
            return None
        parameters = self._adapter.parameters
        with self._whole(list(parameters.values())):
            tensors = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
            if self._sharded:
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        return None if self.rank else self._adapter.files(tensors)

    @property
    def tied_names(self) -> dict[str, str]:
        """Names under which a weight is known twice -> the name that `weights` yields (tied embeddings)."""
        return FolderNames(self._lm).tied()

    def export(self, folder: Path, bucket_bytes: int) -> None:
        """Write an HF folder that loads in transformers and in vLLM as it is, and says what the model's own folder says (export.py).

        Raises RunStopped if a tensor is missing in what was written.
        """
        buckets = self.weights(bucket_bytes)
        try:
            if self.rank == 0:
                write_model(self._lm, buckets, folder, self._beside)
        finally:
            for _ in buckets:  # gathering takes every rank, also when one of them could not write
                pass

    def export_adapter(self, folder: Path) -> None:
        """Write the adapter's folder, as peft and vLLM read it. A collective."""
        if files := self.adapter_weights():
            files.write(folder)

    def save_checkpoint(self, folder: Path) -> None:
        """DeepSpeed checkpoint, a file per rank: the fp32 master weights that a bf16 export does not hold. Without a frozen base."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=self._adapter is not None)

    def load_checkpoint(self, folder: Path, *, name: str = "") -> None:
        """Take up a checkpoint, which the user knows by `name`, of any number of ranks. Raises BadInput, naming it, if it is damaged."""
        name = name or str(folder)
        self._engine.checkpoint_engine.load = _load_known_types
        load = partial(_load_known_types, map_location="cpu", mmap=True)
        try:
            others = num_ranks(folder / _TAG, load) not in (None, self.world_size)
            shards = Shards(folder / _TAG, load) if others else None
            path = folder if others and self._sharded else self._engine.load_checkpoint(
                str(folder), tag=_TAG, load_module_strict=self._adapter is None, load_module_only=others
            )[0]
            if shards:
                take_up(self._engine, shards)
        except Exception as error:  # torch and DeepSpeed raise half a dozen unrelated types for a damaged file
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise BadInput(f"{name}: this checkpoint cannot be loaded ({what}); {_REMEDY}") from error
        if path is None:
            raise BadInput(f"{name}: DeepSpeed found no complete checkpoint; {_REMEDY}")


_BUCKET_ELEMENTS = 50_000_000
"""Gradients that travel together: enough for any network, and a tenth of the memory that DeepSpeed would set aside."""
_IN_CHECKPOINTS = [fragment_address, LossScaler, ZeroStageEnum]
"""All that DeepSpeed pickles into its checkpoints besides tensors and Python's own types."""


def _load_known_types(path: str | Path, map_location: Any = None, *, mmap: bool = False) -> Any:
    """In place of DeepSpeed's `torch.load`, which runs whatever code a file names."""
    with torch.serialization.safe_globals(_IN_CHECKPOINTS):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def _compile_layers(lm: torch.nn.Module) -> None:
    """torch.compile what fuses and does not see the packing: every layer's norms and feed-forward block."""
    for layer in layers_of(body(lm)):
        for name, module in layer.named_children():
            if "attn" not in name and "attention" not in name:
                module.compile(dynamic=True)


def _optimizer(config: LearnerConfig, parameters: Any) -> torch.optim.Optimizer:
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=0.0, weight_decay=config.weight_decay)
    if config.optimizer == "adamw_8bit":
        return adamw_8bit(parameters, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=config.weight_decay, fused=True)


def _deepspeed_config(config: LearnerConfig, hardware: Hardware, *, clips_itself: bool) -> dict[str, Any]:
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": hardware.device == "cuda"}} if config.offload_optimizer else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # step() is the boundary: the number of micro-batches differs from batch to batch
        "gradient_clipping": 0.0 if clips_itself else config.grad_clip,
        "zero_optimization": {
            "stage": config.zero_stage, "reduce_bucket_size": _BUCKET_ELEMENTS, "allgather_bucket_size": _BUCKET_ELEMENTS, **offload,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own needs a compiler on the user's machine, and knows no RMSprop
        "bf16": {"enabled": hardware.dtype == "bfloat16"},
        # The result must not depend on how a batch is cut into micro-batches. Without ZeRO, DeepSpeed has no such mix with bf16.
        "data_types": {"grad_accum_dtype": "fp32"} if config.zero_stage else {},
        "steps_per_print": 10**9,
    }
