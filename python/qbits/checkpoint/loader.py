"""Loading a checkpoint into a model: first every check, then layer after layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qbits.checkpoint import config, layouts
from qbits.checkpoint.reader import CheckpointReader
from qbits.errors import CheckpointFormatError
from qbits.model import linear_groups, replace_group_
from qbits.nn import QuantizedLinear, layer_class, state_4bit, state_8bit
from qbits.records import QTensor4
from qbits.schemes import QuantScheme

__all__ = ["Loader"]


class Loader:
    """One load of a file into a model."""

    def __init__(
        self,
        reader: CheckpointReader,
        quantized: Mapping[str, list[str]],
        model: nn.Module,
        device: torch.device | str | None,
    ) -> None:
        self.reader, self.quantized, self.model, self.device = reader, quantized, model, device
        self.int8_scheme = config.int8_schemes(reader)
        statistics = {key for keys in quantized.values() for key in keys}
        self.plain = [key for key in reader if key not in statistics]
        self.groups = {
            f"{name}.weight": group
            for group in linear_groups(model)
            for _, names in group.layers
            for name in names
        }
        # All names of each parameter and buffer, so that what is shared stays shared and is found under any
        # name.
        self.shared: dict[int, list[str]] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for leaf, tensor in _own_tensors(module):
                self.shared.setdefault(id(tensor), []).append(f"{prefix}.{leaf}" if prefix else leaf)

    def run(self, strict: bool) -> None:
        """Load; nothing is changed where a check fails."""
        self._check(strict)
        for name, keys in self.quantized.items():
            if name in self.groups:
                self._install(name, self._read(name, keys, self._target(name)))
        by_module: dict[str, list[str]] = {}
        for key in self.plain:
            by_module.setdefault(key.rpartition(".")[0], []).append(key)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for prefix, keys in by_module.items():
            if prefix in modules:
                self._fill(modules[prefix], prefix, keys)
        if self.device is not None:
            self.model.to(self.device)

    def _read(self, name: str, keys: Iterable[str], device: torch.device | str = "cpu") -> layouts.Record:
        row = self.groups[name].first.in_features if name in self.groups else None
        return layouts.read_record(self.reader, name, keys, device, row)

    def _check(self, strict: bool) -> None:
        known = {key for names in self.shared.values() for key in names}
        for name, keys in self.quantized.items():
            record = self._read(name, keys)
            if name in self.groups:
                self._check_layer(name, record, self.groups[name].first)
            elif name in known:
                raise CheckpointFormatError(
                    f"qbits::load: {name} must belong to a linear layer, got another module"
                )
        expected = self._expected()
        for key in self.plain:
            dtype = self.reader.info(key).dtype
            if key in self.groups and not dtype.is_floating_point:
                raise CheckpointFormatError(
                    f"qbits::load: {key} must stand beside its scales, got {dtype} alone"
                )
            if key in expected and key not in self.groups:
                self._check_shape(key, self.reader.info(key).shape or (), tuple(expected[key].shape))
        if not strict:
            return
        found = {*self.plain, *self.quantized}
        tied = {key for names in self.shared.values() if found & {*names} for key in names}
        # A buffer that the model does not save may stand in an older file, as BERT's position_ids: not read.
        missing, unexpected = sorted(expected.keys() - found - tied), sorted(found - expected.keys() - known)
        if missing or unexpected:
            raise CheckpointFormatError(
                f"qbits::load: {self.reader.path} must fit the model, got missing keys {missing} "
                f"and unexpected keys {unexpected}"
            )

    def _expected(self) -> dict[str, Tensor]:
        """The model's own keys; a quantized weight counts as one."""
        state = self.model.state_dict(keep_vars=True)
        modules = self.model.named_modules(remove_duplicate=False)
        packed = [name for name, module in modules if isinstance(module, QuantizedLinear)]
        own = {f"{name}.weight" for name in packed}
        prefixes = tuple(f"{name}.{leaf}" for name in packed for leaf in ("weight", state_8bit.SCALES))
        return {
            key: value for key, value in state.items() if key in own or not key.startswith(prefixes or "\0")
        }

    def _check_layer(self, name: str, record: layouts.Record, layer: nn.Linear) -> None:
        self._check_shape(name, record.shape, (layer.out_features, layer.in_features))
        if isinstance(layer, QuantizedLinear) and not layer.accepts(record):
            got = record.codebook if isinstance(record, QTensor4) else "int8"
            raise CheckpointFormatError(
                f"qbits::load: {name} must be {layer.scheme.codebook} as the model's layer is, got {got}"
            )

    def _check_shape(self, key: str, got: tuple[int, ...], due: tuple[int, ...]) -> None:
        if tuple(got) != due:
            raise CheckpointFormatError(
                f"qbits::load: {key} must have the model's shape {due}, got {tuple(got)}"
            )

    def _target(self, name: str) -> torch.device | str:
        """Where a layer's tensors go: the given device, else the model's; from meta to the CPU."""
        if self.device is not None:
            return self.device
        device = self.groups[name].first.weight.device
        return "cpu" if device.type == "meta" else device

    def _install(self, name: str, record: layouts.Record) -> None:
        """Make the layers of a group hold a quantized weight."""
        group = self.groups[name]
        old = group.first
        if isinstance(old, QuantizedLinear):
            old.load_record(record)
            if len(group.layers) > 1:
                replace_group_(self.model, group, old)
            return
        scheme: QuantScheme
        if isinstance(record, QTensor4):
            scheme = state_4bit.scheme_of(record)
        else:
            scheme = self.int8_scheme(name.removesuffix(".weight"))
        replace_group_(self.model, group, layer_class(scheme).from_record(old, record, scheme))

    def _fill(self, module: nn.Module, prefix: str, keys: Iterable[str]) -> None:
        """Copy a module's own tensors, or put them in the place of its meta tensors."""
        held = {f"{prefix}.{leaf}" if prefix else leaf: tensor for leaf, tensor in _own_tensors(module)}
        state: dict[str, Any] = {}
        for key in keys:
            on_meta = key in held and held[key].is_meta
            state[key] = self.reader.read(key, (self.device or "cpu") if on_meta else "cpu")
        errors: list[str] = []
        on_meta = any(held[key].is_meta for key in keys if key in held)
        metadata = {"assign_to_params_buffers": on_meta}
        module._load_from_state_dict(state, f"{prefix}." if prefix else "", metadata, False, [], [], errors)
        if errors:
            raise CheckpointFormatError(f"qbits::load: {prefix} must fit the model, got {'; '.join(errors)}")
        for key in keys:
            if key in held:
                self._share(module, key, held[key])

    def _share(self, module: nn.Module, key: str, before: Tensor) -> None:
        """Give a tensor that took a meta tensor's place to all who shared that."""
        now = getattr(module, key.rpartition(".")[2])
        if now is before:
            return
        for name in self.shared.get(id(before), []):
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, now)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            yield leaf, tensor
