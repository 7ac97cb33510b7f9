"""The policy: a Hugging Face causal LM under DeepSpeed, one code path for CPU (gloo) and GPU (nccl).

Every data-parallel rank has one, and all ranks call the same methods with the same number of micro-batches,
because the methods contain DeepSpeed's collectives. DeepSpeed is imported on first use, which takes seconds.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.utils import logging as transformers_logging

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import AlgorithmSpec, DeepSpeedSpec, LoRASpec, TrainingSpec
from asyncrl_api.placement_spec import ActivationCheckpointing
from asyncrl_runtime.contract.messages import BucketLayout
from asyncrl_runtime.model import attention
from asyncrl_runtime.trainer.sealing import Sealed, seal, seal_folder
from asyncrl_runtime.trainer.update.deepspeed_config import (
    Dtype,
    derive_config,
    derive_reference_config,
    recomputes_activations,
)
from asyncrl_runtime.trainer.update.loss import compute_loss
from asyncrl_runtime.trainer.update.packing import MicroBatch
from asyncrl_runtime.trainer.update.policy_api import StepSettings, Update
from asyncrl_runtime.trainer.update.saved_files import HeldBack, ignore, make_universal, nothing
from asyncrl_runtime.trainer.update.together import DiskWork
from asyncrl_runtime.trainer.update.token_logprobs import token_logprobs
from asyncrl_runtime.weights.adapter_publisher import Adapter
from asyncrl_runtime.weights.bucket import describe
from asyncrl_runtime.weights.copies import share_of

_TAG = "policy"
_TORCH_DTYPES = {"BFloat16": torch.bfloat16, "Float32": torch.float32}


class ResponseModel(nn.Module):
    """A causal LM that returns the log-probs of a micro-batch's sampled tokens."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies, both [R] float32, at the rows' temperatures.

        Logits are computed only where they predict a sampled token.
        """
        output = self.causal_lm(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            attention_plan=batch.attention_plan,
            logits_to_keep=batch.positions,
            use_cache=False,
        )
        return token_logprobs(output.logits[0], batch.targets, batch.temperatures)


class Policy:
    """The model being trained, its optimizer, and the frozen reference if the algorithm has a KL term.

    `policy_api.TrainedPolicy` says what its methods mean.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Dtype,
        training: TrainingSpec,
        algorithm: AlgorithmSpec,
        deepspeed: DeepSpeedSpec,
        activation_checkpointing: ActivationCheckpointing = "Auto",
    ) -> None:
        """Load the model; collective. The caller has already made the process group (gloo or nccl).

        Args:
            folder: the folder of a Hugging Face model, the same on all ranks; also the KL term's reference.
            activation_checkpointing: `spec.trainer.activationCheckpointing`.
        """
        library = _import_deepspeed()  # before transformers does so and chooses the accelerator itself
        self.device = _local_device()
        self.world_size = dist.get_world_size()
        self._folder = folder
        self._algorithm = algorithm
        self._zero_stage = deepspeed.zero_stage
        self._dtype: Dtype = dtype
        self._lora = training.lora
        self.trains_adapters = training.trains_adapters
        derive = partial(
            derive_config,
            zero_stage=deepspeed.zero_stage,
            dtype=dtype,
            gradient_clipping=training.gradient_clipping,
            overrides=deepspeed.config,
        )
        config = derive(num_parameters=count_parameters(folder))
        self._reference_config = derive_reference_config(config) if self.is_sharded else None
        with _without_prints():
            model = load_model(folder, dtype, sharded_by=config if self.is_sharded else None)
        if self.trains_adapters:
            config = derive(num_parameters=add_adapters(model, training.lora, training.seed))
        if recomputes_activations(activation_checkpointing, self.device.type):
            model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        groups = parameter_groups(model, training.weight_decay)
        self._is_decayed = [_num_dimensions(group["params"][0]) >= 2 for group in groups]
        with _without_prints():
            self._engine = library.initialize(model=model, model_parameters=groups, config=config)[0]
        self._reference: Callable[[MicroBatch], tuple[Tensor, Tensor]] | None = None
        self._keep_reference(algorithm.kl_coefficient > 0)

    def use(self, settings: StepSettings) -> None:
        """See the protocol."""
        self._algorithm = settings.algorithm
        optimizer = self._engine.optimizer
        for group, is_decayed in zip(optimizer.param_groups, self._is_decayed, strict=True):
            group["weight_decay"] = settings.weight_decay if is_decayed else 0.0
            group["betas"], group["eps"] = settings.betas, settings.epsilon
        # Each of DeepSpeed's optimizers has a copy of its own, but for the one of stage 0 in float32.
        self._engine._config.gradient_clipping = settings.gradient_clipping
        optimizer.clip_grad = settings.gradient_clipping
        self._keep_reference(settings.algorithm.kl_coefficient > 0)

    def _keep_reference(self, is_needed: bool) -> None:
        """Load the reference, or let go of it."""
        if not is_needed:
            self._reference = None
        elif self._reference is None:
            self._reference = self._without_adapters if self.trains_adapters else self._load_reference()

    def _without_adapters(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return what the model returns without its adapters: it has not been trained itself."""
        model: ResponseModel = self._engine.module
        peft_model: Any = model.causal_lm
        with peft_model.disable_adapter():
            result: tuple[Tensor, Tensor] = model(batch)
        return result

    def _load_reference(self) -> Callable[[MicroBatch], tuple[Tensor, Tensor]]:
        """Load the model once more; if the policy is sharded, this is too, and loading is collective."""
        with _without_prints():
            model = load_model(self._folder, self._dtype, sharded_by=self._reference_config)
            if self._reference_config is None:
                return model.to(self.device).requires_grad_(False)
            # Not its module alone: an engine that nobody holds takes its hooks away.
            engine: Callable[[MicroBatch], tuple[Tensor, Tensor]] = _import_deepspeed().initialize(
                model=model, config=self._reference_config
            )[0]
            return engine

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        return [self._engine.module(batch.to(self.device))[0] for batch in micro_batches]

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        proximal_logprobs: Sequence[Tensor] | None,
        num_tokens: int,
        learning_rate: float,
    ) -> Update:
        sums, logprobs = [], []
        for number, batch in enumerate(micro_batches):
            batch = batch.to(self.device)
            # Set before each, because DeepSpeed's own count does not allow minibatches of varying size.
            self._engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
            # Before the pass that is differentiated: to switch adapters off changes what needs a gradient.
            reference_logprobs = self._reference_logprobs(batch)
            new_logprobs, entropies = self._engine(batch)
            loss = compute_loss(
                self._algorithm,
                batch,
                new_logprobs,
                entropies,
                proximal_logprobs=None if proximal_logprobs is None else proximal_logprobs[number],
                reference_logprobs=reference_logprobs,
                num_tokens=num_tokens,
            )
            # DeepSpeed takes the mean of the ranks' gradients, while this loss needs their sum.
            self._engine.backward(loss.value * self.world_size)
            sums.append(loss.sums)
            logprobs.append(new_logprobs.detach())
        gradient_norm = self._step(learning_rate)
        return Update(self.reduce(torch.stack(sums).sum(0)), gradient_norm, logprobs)

    def reduce(self, sums: Tensor) -> Tensor:
        total = sums.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def _step(self, learning_rate: float) -> float:
        """Apply the gradient, unless it is not finite, and return its norm."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._zero_stage == 0 and self._dtype == "Float32":
            # Here DeepSpeed keeps no norm, and applies a gradient that is not finite. All ranks have the same
            # gradient.
            grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            norm = float(nn.utils.get_total_norm(grads))
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return norm
            self._engine.step()
            return norm
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    @torch.no_grad()
    def _reference_logprobs(self, batch: MicroBatch) -> Tensor | None:
        if self._reference is None:
            return None
        logprobs: Tensor = self._reference(batch)[0]
        return logprobs

    @property
    def is_sharded(self) -> bool:
        return self._zero_stage == 3

    @property
    def num_bytes(self) -> int:
        return sum(_num_bytes(each) for each in self._parameters.values() if each.requires_grad)

    def buckets(self, max_bytes: int) -> list[tuple[str, ...]]:
        buckets: list[tuple[str, ...]] = []
        room = 0
        for name, parameter in self._parameters.items():
            if not buckets or _num_bytes(parameter) > room:
                buckets.append(())
                room = max_bytes
            buckets[-1] += (name,)
            room -= _num_bytes(parameter)
        return buckets

    def layout(self, names: Sequence[str]) -> BucketLayout:
        chosen = {name: self._parameters[name] for name in names}
        return describe((name, each.dtype, _shape(each)) for name, each in chosen.items())

    def shares(self, names: Sequence[str]) -> Iterator[Tensor]:
        found = self._parameters
        for name in names:
            share = share_of(_num_elements(found[name]), dist.get_rank(), self.world_size)
            if self.is_sharded and (own := _own_share(found[name], share)) is not None:
                yield own
                continue
            with self._whole(found[name]):
                yield found[name].detach().reshape(-1)[share]

    def weights(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield weights by their Hugging Face names. If the policy is sharded, every rank must exhaust this.

        A tensor must not be changed. If the policy is sharded, it is whole until the next one is asked for.
        """
        found = self._parameters
        for name in names:
            with self._whole(found[name]):
                yield name, found[name].detach()

    def _whole(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[object]:
        """Make a parameter whole on every rank during the body; collective if the policy is sharded."""
        if not self.is_sharded:
            return contextlib.nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        context: contextlib.AbstractContextManager[object] = GatheredParameters([parameter])
        return context

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._engine.module.causal_lm.named_parameters())

    @torch.no_grad()
    def adapter(self) -> Adapter:
        causal_lm = self._engine.module.causal_lm
        with tempfile.TemporaryDirectory() as folder:
            causal_lm.peft_config["default"].save_pretrained(folder)
            config = (Path(folder) / "adapter_config.json").read_text()
        weights = {
            name: tensor.cpu().contiguous() for name, tensor in get_peft_model_state_dict(causal_lm).items()
        }
        return Adapter(config, safetensors.torch.save(weights))

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> DiskWork:
        """See the protocol. If the policy is sharded, rank 0 needs room for all weights on the CPU."""
        state: dict[str, Tensor] | None = None
        if self.is_sharded:
            state = {}
            for name, tensor in self.weights(tuple(self._parameters)):
                if dist.get_rank() == 0:
                    state[name] = tensor.to("cpu", copy=True)
        if dist.get_rank() != 0:
            return nothing

        def write(sealed: Sealed) -> None:
            self._engine.module.causal_lm.save_pretrained(folder, state_dict=state)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            seal_folder(folder, sealed)

        return write

    def export_whole(self, base: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a folder that an engine can sample from as it is, with adapters merged into the model.

        Args:
            base: the folder of the model that training started from.
        """
        if not self.trains_adapters:
            self.export(folder, tokenizer)(ignore)
            return
        self.export(folder / "adapter", None)(ignore)
        merge_adapter(base, folder / "adapter", folder)
        tokenizer.save_pretrained(folder)

    def save(self, folder: Path) -> DiskWork:
        held_back, own = HeldBack(), self._engine.checkpoint_engine
        self._engine.checkpoint_engine, self._engine._copy_recovery_script = held_back, lambda path: None
        try:
            self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        finally:
            self._engine.checkpoint_engine = own
        rank = dist.get_rank()
        files: dict[Path, Any] = {**held_back.files, folder / f"random_{rank}.pt": _random_state()}

        def write(sealed: Sealed) -> None:
            for path, state in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(state, path)
                seal(path, sealed)
            if rank == 0:
                (folder / "layout.json").write_text(json.dumps(self._layout))
                seal(folder / "layout.json", sealed)

        return write

    def convert(self, folder: Path, scratch: Path) -> DiskWork:
        layout = self._layout_of(folder)  # by all ranks, so that all refuse it together
        if dist.get_rank() != 0 or not self._needs_conversion(layout):
            return nothing

        def write(sealed: Sealed) -> None:
            shutil.rmtree(scratch, ignore_errors=True)
            make_universal(folder / _TAG, scratch / _TAG, sealed, is_sharded=self.is_sharded)

        return write

    def load(self, folder: Path, scratch: Path) -> None:
        layout = self._layout_of(folder)
        settings = _settings_of(self._optimizer)
        with _without_prints():
            if self._needs_conversion(layout):
                self._load_shares_of_others(scratch)
            else:
                self._engine.load_checkpoint(str(folder), tag=_TAG)
        _put_back(self._optimizer, settings)
        source = dist.get_rank() % layout["world_size"]
        _set_random_state(torch.load(folder / f"random_{source}.pt", weights_only=True))

    def _layout_of(self, folder: Path) -> Any:
        """Return the layout of a checkpoint.

        Raises:
            ValueError: this policy cannot load it.
        """
        layout = json.loads((folder / "layout.json").read_text())
        if fault := _misfit(layout, self._layout):
            raise ValueError(f"checkpoint {folder} has layout {layout}, this trainer {self._layout}: {fault}")
        return layout

    def _needs_conversion(self, layout: Any) -> bool:
        return layout != self._layout and self._zero_stage > 0

    def _load_shares_of_others(self, scratch: Path) -> None:
        """Load a ZeRO checkpoint of other ranks, or of another stage, as `convert` has prepared it."""
        self._engine._config.load_universal_checkpoint = True
        try:
            self._engine.load_checkpoint(str(scratch), tag=_TAG)
        finally:
            self._engine._config.load_universal_checkpoint = False
        if self.is_sharded:
            _part_step_counts(self._optimizer)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(scratch)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed's own is made around, if there is one around it."""
        optimizer: torch.optim.Optimizer = getattr(
            self._engine.optimizer, "optimizer", self._engine.optimizer
        )
        return optimizer

    @property
    def _layout(self) -> dict[str, int | str]:
        layout = {"world_size": self.world_size, "zero_stage": self._zero_stage, "dtype": self._dtype}
        return layout | ({"lora": self._lora.model_dump_json()} if self.trains_adapters else {})


def _misfit(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Return why a checkpoint of layout `saved` cannot be loaded; empty if it can.

    Shares of the optimizer can be divided anew, among other ranks and between the stages that divide nothing
    else. DeepSpeed's universal formats of stage 3 and of the others are different ones.
    """
    stages = {saved["zero_stage"], own["zero_stage"]}
    if len(stages) > 1 and not stages <= {1, 2}:
        return "spec.trainer.deepspeed.zeroStage may only change between 1 and 2; put it back"
    anew = {"world_size": own["world_size"], "zero_stage": own["zero_stage"]}
    return "" if {**saved, **anew} == own else "dtype and adapters must be those of the checkpoint"


def _settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what the optimizer was made with, by group, without what a training step decides."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "lr", "step")}
        for group in optimizer.param_groups
    ]


def _put_back(optimizer: torch.optim.Optimizer, settings: Sequence[Mapping[str, Any]]) -> None:
    """Put an optimizer's own settings back into force, which loading replaces by those of the checkpoint.

    DeepSpeed 0.19.8 even gives all groups the settings of the first when it loads ZeRO 3's universal format.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    if any(own.get("amsgrad") for own in settings):
        for state in optimizer.state.values():  # a checkpoint that was made without it has no maximum
            if "exp_avg_sq" in state:
                state.setdefault("max_exp_avg_sq", state["exp_avg_sq"].clone())


def _part_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Give each state a count of steps of its own.

    DeepSpeed 0.19.8 gives all of them the same tensor when it loads ZeRO 3's universal format, and each would
    advance it.
    """
    for state in optimizer.state.values():
        state["step"] = torch.as_tensor(state["step"]).clone()


def load_model(folder: Path, dtype: Dtype, *, sharded_by: Mapping[str, Any] | None = None) -> ResponseModel:
    """Load a causal LM whose passes over the same tokens always give the same log-probs: dropout is off.

    It is in training mode nevertheless, because transformers recomputes activations only in that mode.

    Args:
        sharded_by: DeepSpeed's config for ZeRO 3, by which each weight is cut into shares as it is made.
    """
    transformers_logging.disable_progress_bar()
    # transformers finds it by a weak reference, so it must live as long as this call.
    sharding = HfDeepSpeedConfig(dict(sharded_by)) if sharded_by is not None else None
    causal_lm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=_TORCH_DTYPES[dtype], attn_implementation=attention.IMPLEMENTATION
    )
    del sharding
    for module in causal_lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return ResponseModel(causal_lm).train()


def add_adapters(model: ResponseModel, lora: LoRASpec, seed: int) -> int:
    """Freeze the model, and add small factors to its linear layers that change nothing at first.

    Returns:
        The number of parameters that are trained.

    Raises:
        ExitError: no layer has a name in `target_modules`.
    """
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:  # in the model's dtype, since DeepSpeed keeps the fp32 master weights
            model.causal_lm = get_peft_model(model.causal_lm, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            message = f"spec.training.lora.targetModules: {str(error).splitlines()[0]}"
            raise ExitError(ExitCode.REFUSED, message) from error
    model.train()
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def merge_adapter(base: Path, adapter: Path, folder: Path) -> None:
    """Write a Hugging Face folder of a model with its adapters merged in."""
    causal_lm = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(causal_lm, adapter).merge_and_unload().save_pretrained(folder)


def count_parameters(folder: Path) -> int:
    """Return the number of a model's parameters, counting tied ones once, without creating any."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in model.parameters())


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter, of which this rank may hold only a share."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _num_elements(parameter: nn.Parameter) -> int:
    """Return the size of the whole parameter, of which ZeRO 3 leaves only a share here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _num_bytes(parameter: nn.Parameter) -> int:
    return _num_elements(parameter) * parameter.element_size()


def _own_share(parameter: nn.Parameter, share: slice) -> Tensor | None:
    """Return the share of a parameter that this rank holds under ZeRO 3, without padding.

    None if it does not lie here as it is and divided in this way: on NVMe, quantized, or within sub-groups.
    """
    held: Any = getattr(parameter, "ds_tensor", None)
    size = share.stop - share.start
    is_plain = held is not None and held.dtype == parameter.dtype and not hasattr(held, "ds_quant_scale")
    if not is_plain or held.status.name != "AVAILABLE" or held.ds_numel != _share_size(parameter):
        return None
    whole: Tensor = held.detach()
    return whole.reshape(-1)[:size]


def _share_size(parameter: nn.Parameter) -> int:
    """Return the elements of each rank's share, with padding."""
    return math.ceil(_num_elements(parameter) / dist.get_world_size())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: weight decay for matrices and embeddings, none for norms and biases.

    Decay pulls toward zero, which is not a neutral value for the scale of a norm.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    parameters = [(p, _num_dimensions(p)) for p in trained]
    groups: list[dict[str, Any]] = [
        {"params": [p for p, ndim in parameters if ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p, ndim in parameters if ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _num_dimensions(parameter: nn.Parameter) -> int:
    """Return the dimensions of the whole parameter, of which ZeRO 3 leaves only a flat share here."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _local_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _import_deepspeed() -> Any:
    """Import DeepSpeed in such a way that it needs no compiler and logs only warnings and errors."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it, but only torchrun sets it
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Otherwise the first process group compiles a shared-memory all-reduce with g++, which takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _without_prints() -> Iterator[None]:
    """Hide what DeepSpeed prints without its logger; the logger's warnings still appear."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
