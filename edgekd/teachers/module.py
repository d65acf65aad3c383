"""Any torch module, or anything else, as a teacher through a small adapter of the user's own."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.artifact import sha256_file
from edgekd.boxes import have_extent
from edgekd.detectors.base import TapSpec
from edgekd.errors import RuntimeFailure, UserError
from edgekd.predictor import Predictor
from edgekd.preprocess import normalisation
from edgekd.recipe import ModuleTeacher, mean_of_shares, std_of_shares
from edgekd.runtimes.output_format import NORMALISED_BELOW, OutputFormat
from edgekd.teachers.base import TeacherOutput
from edgekd.teachers.predicted import ANSWER_THRESHOLD, PredictorTeacher, soft_targets_from
from edgekd.types import Channels, FloatArray, PreprocessSpec, ResizeMode

_ROUNDING = 1e-3
_FEWEST_SHARES = 3
"""Boxes that show of which unit they are: a lone one may lie in the corner."""
AdapterAnswer = Sequence[tuple[Any, Any]]
"""One (boxes_xyxy (n, 4) input pixels, class_probs (n, classes) in [0, 1]) an image, as tensors or arrays."""


@runtime_checkable
class ModuleAdapter(Protocol):
    """What a factory named in a recipe must return; plain attributes will do for the properties."""

    @property
    def preprocess(self) -> PreprocessSpec:
        """How images are prepared for it."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """Its classes, in the order of `class_probs`."""
        ...

    def __call__(self, images: Tensor) -> AdapterAnswer:
        """Answer a batch: images (B, 3, h, w) float32, normalised by `preprocess`, on the teacher's device."""
        ...


@runtime_checkable
class TappedAdapter(ModuleAdapter, Protocol):
    """An adapter that can also hand out feature maps."""

    @property
    def tap_specs(self) -> Mapping[str, TapSpec]:
        """What `taps` may name."""
        ...

    def call_with_taps(self, images: Tensor, taps: Sequence[str]) -> tuple[AdapterAnswer, Mapping[str, Tensor]]:
        """Like `__call__`, with the maps that were asked for, each (B, C, H, W)."""
        ...


class AdapterRuntime:
    """An adapter as a runtime of one image: "boxes" (1, N, 4) and "scores" (1, N, K)."""

    name = "torch"
    output_names: tuple[str, ...] = ("boxes", "scores")
    dynamic_batch = False

    def __init__(self, adapter: ModuleAdapter, label: str, device: str) -> None:
        self.adapter: ModuleAdapter | None = adapter
        self.label = label
        self.provider = device
        self.input_shape = (1, 3, *adapter.preprocess.input_hw)
        self._classes = len(adapter.class_names)

    def run(self, images: FloatArray) -> Mapping[str, NDArray[np.generic]]:
        """One inference: images (1, 3, h, w) float32, normalised.

        Raises:
            RuntimeFailure: the adapter failed or is closed. UserError: its answer has the wrong shape.
        """
        answer = self.ask(torch.from_numpy(images).to(self.provider))[0]
        return {"boxes": answer["boxes"][None], "scores": answer["scores"][None]}

    @torch.no_grad()
    def ask(self, images: Tensor) -> list[dict[str, FloatArray]]:
        """The adapter's checked answer to a batch, one {"boxes", "scores"} an image."""
        if self.adapter is None:
            raise RuntimeFailure(f"{self.label}: this adapter is closed")
        try:
            answers = self.adapter(images)
        except Exception as error:  # foreign code: whatever it raises
            raise RuntimeFailure(f"{self.label} failed", got=f"{type(error).__name__}: {error}") from error
        return self.checked(answers, len(images))

    @torch.no_grad()
    def ask_with_taps(
        self, images: Tensor, taps: Sequence[str]
    ) -> tuple[list[dict[str, FloatArray]], dict[str, Tensor]]:
        """Like `ask`, with the checked maps of these taps, each (B, C, H, W)."""
        if not isinstance(self.adapter, TappedAdapter):
            raise RuntimeFailure(f"{self.label}: this adapter is closed, or has no taps")
        try:
            both = self.adapter.call_with_taps(images, taps)
        except Exception as error:  # foreign code: whatever it raises
            raise RuntimeFailure(f"{self.label} failed", got=f"{type(error).__name__}: {error}") from error
        if not isinstance(both, tuple) or len(both) != 2 or not isinstance(both[1], Mapping):
            raise UserError(
                f"{self.label}: call_with_taps did not return an answer and maps",
                got=_described(both),
                expected="(answer, {tap: map (B, C, H, W)})",
            )
        answers, maps = both
        return self.checked(answers, len(images)), {
            tap: self._checked_map(maps, self.adapter.tap_specs[tap], len(images)) for tap in taps
        }

    def _checked_map(self, maps: Mapping[str, Any], spec: TapSpec, images: int) -> Tensor:
        expected = (images, spec.channels, *spec.grid_hw)
        found = maps.get(spec.name)
        if not isinstance(found, Tensor) or tuple(found.shape) != expected:
            raise UserError(
                f"{self.label}: its map of tap {spec.name!r} is not what `tap_specs` says",
                got="none" if found is None else _described(found),
                expected=f"a tensor {expected}",
            )
        if not bool(torch.isfinite(found).all()):
            raise UserError(
                f"{self.label}: its map of tap {spec.name!r} is not finite",
                got=f"{int((~torch.isfinite(found)).sum())} of {found.numel()} values are NaN or infinite",
                expected="finite features",
            )
        return found

    def checked(self, answers: AdapterAnswer, images: int) -> list[dict[str, FloatArray]]:
        """The same as numpy.

        Raises:
            UserError: it is not one (boxes, class_probs) an image, or has values that cannot be.
        """
        found = self._pairs(answers)
        if found is None or len(found) != images:
            raise UserError(
                f"{self.label}: its answer is not of the adapter's form",
                got=f"for {images} images: {_described(answers)}",
                expected=f"one (boxes (n, 4), class_probs (n, {self._classes})) an image",
                fix="see edgekd.teachers.module.ModuleAdapter; torchvision's dictionaries have labels instead of class_probs",
            )
        for boxes, scores in found:
            if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
                raise UserError(
                    f"{self.label}: its answer is not finite",
                    got=f"{int((~np.isfinite(boxes)).sum())} box values, {int((~np.isfinite(scores)).sum())} probabilities",
                    expected="finite boxes and class_probs",
                )
            if scores.size and not (scores.min() >= -_ROUNDING and scores.max() <= 1 + _ROUNDING):
                raise UserError(
                    f"{self.label}: its class_probs are no probabilities",
                    got=f"{scores.min():g} to {scores.max():g}",
                    expected="0 to 1",
                    fix="apply the detector's own sigmoid or softmax, or divide percentages by 100",
                )
            told = boxes[have_extent(boxes) & (scores.max(1, initial=0.0) > ANSWER_THRESHOLD)]
            if len(told) >= _FEWEST_SHARES and told.max() <= NORMALISED_BELOW:
                height, width = self.input_shape[2:]
                raise UserError(
                    f"{self.label}: its boxes are shares of the picture, it seems",
                    got=f"{len(told)} boxes that all end at {told.max():g} or before",
                    expected=f"x1, y1, x2, y2 in pixels of its input, {width} wide and {height} high",
                    fix="multiply them by the input's width and height",
                )
        return [{"boxes": boxes, "scores": scores.clip(0, 1)} for boxes, scores in found]

    def _pairs(self, answers: Any) -> list[tuple[FloatArray, FloatArray]] | None:
        """The (boxes, class_probs) of an answer; None if it has another form."""
        pairs = []
        try:
            for answer in answers:
                boxes, scores = map(_as_array, answer)
                if boxes.shape == scores.shape == (0,):  # torch.tensor([]) of an image that shows nothing
                    boxes, scores = boxes.reshape(0, 4), scores.reshape(0, self._classes)
                if boxes.shape != (len(boxes), 4) or scores.shape != (len(boxes), self._classes):
                    return None
                pairs.append((boxes, scores))
        except (TypeError, ValueError):  # not two arrays an image
            return None
        return pairs

    def close(self) -> None:
        """Let go of the adapter; further calls raise."""
        self.adapter = None

    def __enter__(self) -> AdapterRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _described(value: Any) -> str:
    """What foreign code gave, by type and shape."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_described(part)}" for key, part in list(value.items())[:4]) + "}"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_described(part) for part in value[:4]) + (", ..." if len(value) > 4 else "")
        return f"({shown})" if isinstance(value, tuple) else f"[{shown}]"
    return type(value).__name__


def _as_array(value: Any) -> FloatArray:
    if isinstance(value, Tensor):
        value = value.detach().float().cpu().numpy()
    return np.asarray(value, np.float32)


class AdapterTeacher(PredictorTeacher):
    """An adapter as a teacher.

    Args:
        name: unique among the recipe's teachers.
        adapter: answers batches.
        student_class_names: the label set of all answers.
        class_map: teacher class to student class, where names do not say it.
        device: where images are put before the adapter is called.
        facts: what is known of it, for provenance.

    Raises:
        ClassMapError: none of its classes is one of the student's.
    """

    def __init__(
        self,
        name: str,
        adapter: ModuleAdapter,
        student_class_names: Sequence[str],
        class_map: Mapping[str, str] | None = None,
        *,
        device: str = "cpu",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        runtime = AdapterRuntime(adapter, f"teacher {name!r}", device)
        form = OutputFormat("boxes-scores", ("boxes", "scores"), len(adapter.class_names))
        # With tuples where lists were given: teachers that prepare images alike are found by this.
        preprocess = PreprocessSpec.from_dict(adapter.preprocess.to_dict())
        predictor = Predictor(name, tuple(adapter.class_names), preprocess, runtime, form, facts=facts)
        specs = adapter.tap_specs if isinstance(adapter, TappedAdapter) else {}
        super().__init__(name, predictor, student_class_names, class_map, tap_specs=specs)
        self._runtime = runtime

    def respond(self, images_u8: Tensor, taps: Sequence[str] = (), boxes: bool = True) -> TeacherOutput:
        """Answer a batch, see `Teacher.respond`.

        Raises:
            DistillationSetupError: an unknown tap, or images of another size. RuntimeFailure: the adapter failed.
        """
        self._check_request(images_u8, taps)
        device = torch.device(self._runtime.provider)
        scale, bias = (torch.from_numpy(values).to(device) for values in normalisation(self.preprocess))
        pixels = images_u8.flip(1) if self.preprocess.channels == "bgr" else images_u8
        images = pixels.to(device, torch.float32).mul_(scale).add_(bias)
        answers, maps = self._runtime.ask_with_taps(images, taps) if taps else (self._runtime.ask(images), {})
        asked = answers if boxes else ()
        soft = [self._answering.soft_candidates({key: value[None] for key, value in one.items()}) for one in asked]
        return TeacherOutput(soft_targets_from(soft, images_u8.device), taps=maps)


def module_teacher(config: ModuleTeacher, class_names: Sequence[str], device: str) -> AdapterTeacher:
    """The teacher that a factory 'package.module:function' makes, called with the recipe's `args`.

    Raises:
        UserError: the factory cannot be imported, fails, or returns something that is not an adapter.
    """
    factory = _factory(config.module)
    try:
        with _working_directory_first():  # it may import what lies beside it only now
            adapter = factory(**config.args)
    except (Exception, SystemExit) as error:  # foreign code: whatever it raises
        raise UserError(
            f"teacher {config.name!r}: its factory failed",
            got=f"{type(error).__name__}: {error}",
            expected=f"{config.module}(**args) to return an adapter; args: {config.args}",
        ) from error
    missing = [key for key in ("preprocess", "class_names", "__call__") if not hasattr(adapter, key)]
    if missing or not isinstance(adapter.preprocess, PreprocessSpec):
        raise UserError(
            f"teacher {config.name!r}: its factory did not return an adapter",
            got=f"{type(adapter).__name__} without {', '.join(missing)}" if missing else "a foreign `preprocess`",
            expected="preprocess: PreprocessSpec, class_names, and __call__(images) -> [(boxes, class_probs), ...]",
            fix="see edgekd.teachers.module.ModuleAdapter",
        )
    _check_preprocess(config.name, adapter.preprocess)
    names = adapter.class_names
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"teacher {config.name!r}: its class names are no list of texts",
            got=repr(names)[:200],
            expected="class_names: a sequence of str, in the order of class_probs",
        )
    if isinstance(adapter, TappedAdapter):
        specs: Any = adapter.tap_specs
        named = isinstance(specs, Mapping) and all(isinstance(spec, TapSpec) for spec in specs.values())
        if not named or any(name != spec.name for name, spec in specs.items()):
            raise UserError(
                f"teacher {config.name!r}: its tap_specs are not TapSpecs by their names",
                got=repr(specs)[:200],
                expected='such as {"p3": TapSpec("p3", "neck", 256, (80, 80))}',
            )
    _still(adapter, device)
    facts = {"module": config.module, "args": dict(config.args)}
    return AdapterTeacher(config.name, adapter, class_names, config.class_map, device=device, facts=facts)


def _still(adapter: ModuleAdapter, device: str) -> None:
    """Put an adapter that is a torch module, or those that it holds, on the device, in eval mode and without gradients.

    What `load_state_dict` has filled is still in train mode, in which each answer depends on the pictures beside it.
    """
    for module in _modules(adapter if isinstance(adapter, torch.nn.Module) else getattr(adapter, "__dict__", {})):
        module.to(device)
        for parameter in module.parameters():  # TorchScript has no `requires_grad_`
            parameter.requires_grad_(False)
        try:
            module.eval()
        except NotImplementedError:  # an exported program in it, which has but the mode that it was exported in
            for part in module.modules():
                part.training = False


def _modules(value: Any) -> Iterator[torch.nn.Module]:
    if isinstance(value, torch.nn.Module):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _modules(part)


_PREPROCESS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "input_hw": (lambda value: len(value) == 2 and min(value) > 0, "(height, width) in pixels"),
    "resize": (lambda value: value in get_args(ResizeMode), "one of " + ", ".join(get_args(ResizeMode))),
    "mean": (lambda value: len(value) == 3 and bool(mean_of_shares(value)), "three numbers"),
    "std": (lambda value: len(value) == 3 and bool(std_of_shares(value)), "three numbers"),
    "pad_value": (lambda value: 0 <= value <= 255, "a grey level from 0 to 255"),
    "channels": (lambda value: value in get_args(Channels), "one of " + ", ".join(get_args(Channels))),
}
"""Of a `PreprocessSpec` that a user wrote: what each value must be. Python lets a dataclass hold anything."""


def _check_preprocess(name: str, given: PreprocessSpec) -> None:
    for key, (fits, expected) in _PREPROCESS.items():
        value = getattr(given, key)
        try:
            right, wanted = fits(value), expected
        except TypeError:  # of another type altogether
            right, wanted = False, expected
        except ValueError as error:
            right, wanted = False, f"that {error}"
        if not right:
            raise UserError(
                f"teacher {name!r}: the {key} of its `preprocess` is wrong", got=repr(value), expected=wanted
            )


def module_content(config: ModuleTeacher) -> dict[str, str]:
    """What such a teacher is, by content: a hash of the module's source, and of each file that its arguments name.

    Of a module in a package all of the package's Python files count; what it imports from elsewhere does not.
    """
    content: dict[str, str] = {}
    with _working_directory_first():
        try:
            found = importlib.util.find_spec(config.module.partition(":")[0])
        except (ImportError, ValueError):  # said better where the factory is imported
            found = None
    if found is not None and found.origin is not None and Path(found.origin).is_file():
        source = Path(found.origin)
        within_package = "." in found.name or found.submodule_search_locations is not None
        files = sorted(source.parent.rglob("*.py")) if within_package else [source]
        content |= {f"source:{file.relative_to(source.parent)}": sha256_file(file) for file in files}
    named = [value for value in _texts(config.args) if _is_file(value)]
    return content | {f"file:{name}": sha256_file(Path(name).expanduser()) for name in named}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # a text that is no path
        return False


@contextlib.contextmanager
def _working_directory_first() -> Iterator[None]:
    """The command `edgekd`, unlike `python -m`, does not look for modules in the working directory."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # foreign code may have taken it out
            sys.path.remove(here)


def _factory(reference: str) -> Callable[..., Any]:
    module_name, _, function_name = reference.partition(":")
    if not module_name or not function_name:
        raise UserError("a module teacher is named by its factory", got=reference, expected="package.module:function")
    try:
        with _working_directory_first():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # foreign code: whatever it raises; a script may exit
        raise UserError(
            f"module {module_name!r} cannot be imported",
            got=f"{type(error).__name__}: {error}",
            expected="a module in the working directory or installed beside edgekd",
            fix=f"leave `.py` out: {module_name.removesuffix('.py')}:{function_name}"
            if module_name.endswith(".py")
            else None,
        ) from error
    factory = getattr(module, function_name, None)
    if not callable(factory):
        functions = sorted(name for name, value in vars(module).items() if callable(value) and name[0] != "_")
        raise UserError(
            f"module {module_name!r} has no such function",
            got=function_name,
            expected="one of " + ", ".join(functions[:20]),
        )
    return factory  # type: ignore[no-any-return]
