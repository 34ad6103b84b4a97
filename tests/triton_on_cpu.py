"""What Triton's interpreter needs to run our kernels, and to do so in half of its time.

None of it changes a bit of a result, or leaves out a check.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch


def prepare() -> None:
    """To be called once, before the first launch."""
    from triton.runtime import interpreter

    _let_loops_run_over_tensors()
    _trace_each_kind_of_launch_once()
    if hasattr(interpreter, "_LangPatchScope"):  # a Triton that has neither name only takes longer
        _patch_once_a_launch()
    if hasattr(interpreter, "_get_np_dtype"):
        _make_types_once()


def _let_loops_run_over_tensors() -> None:
    """Triton 3.6's interpreter makes loop bounds numbers in a way that NumPy 2.4 does not allow."""
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def _around_launches(around: Callable[..., None]) -> None:
    from triton.runtime import interpreter

    executor: Any = interpreter.GridExecutor
    launch = executor.__call__
    executor.__call__ = lambda self, *args, **named: around(launch, self, *args, **named)


def _trace_each_kind_of_launch_once() -> None:
    """For the coverage: of launches that differ in numbers alone, all but the first go untraced.

    They walk the same lines, and to trace the interpreter takes longer than it takes itself.
    """
    seen = set[object]()

    def launched(launch: Any, self: Any, /, *args: Any, **named: Any) -> None:
        trace = sys.gettrace()
        if trace is None:
            return launch(self, *args, **named)
        kind = (self.fn, *map(_kind, args), *((name, _kind(named[name])) for name in sorted(named)))
        if kind not in seen:
            seen.add(kind)
            return launch(self, *args, **named)
        sys.settrace(None)
        try:
            return launch(self, *args, **named)
        finally:
            sys.settrace(trace)

    _around_launches(launched)


def _kind(argument: object) -> object:
    if isinstance(argument, int | float) and not isinstance(argument, bool):
        return type(argument)
    return argument.dtype if isinstance(argument, torch.Tensor) else repr(argument)


def _patch_once_a_launch() -> None:
    """At each call of a function in a kernel the interpreter goes through all of Triton's language,
    to replace what the launch has replaced already."""
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang
    languages = (interpreter.tl, interpreter.tl.core)
    patched = set[tuple[bool, ...]]()

    def launched(launch: Any, /, *args: Any, **named: Any) -> None:
        patched.clear()
        launch(*args, **named)

    def patch_what_is_not(fn: Any) -> Any:
        seen = [value for value in fn.__globals__.values() if value in languages]
        key = tuple(language in seen for language in languages)
        if key in patched:
            return interpreter._LangPatchScope()  # with nothing to be undone
        patched.add(key)
        return patch(fn)

    interpreter._patch_lang = patch_what_is_not
    _around_launches(launched)


def _make_types_once() -> None:
    """Each value is given a type and a shape of its own, which takes longer than its numbers do."""
    from triton.language import core
    from triton.runtime import interpreter

    make_block: Any = core.block_type.__init__
    make_tensor: Any = core.tensor.__init__
    numpy_type: Any = interpreter._get_np_dtype
    blocks: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}
    numpy_types: dict[str, Any] = {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple(n.value if isinstance(n, core.constexpr) else n for n in shape)
        if key not in blocks or any(type(n) is not int for n in key):  # 1.0 is no size
            make_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = blocks[key]
        self.name = f"<{text}, {element_ty}>"

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in tensors:
            make_tensor(self, handle, type)
            tensors[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[key]

    def of_numpy(tt_dtype: Any) -> Any:
        scalar = tt_dtype.scalar
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = numpy_type(scalar)
        return numpy_types[scalar.name]

    core.block_type.__init__ = block
    core.tensor.__init__ = tensor
    interpreter._get_np_dtype = of_numpy
