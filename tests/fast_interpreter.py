"""Triton's interpreter, made faster: without what it does in vain, so with the same results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable


def speed_up() -> None:
    """Takes from the interpreter two thirds of its time.

    It puts its functions into triton.language when a kernel is launched and again whenever that calls a function, which
    then changes nothing: what was replaced is no builtin any more. It makes a table of all dtypes to look up one. And
    it repeats integer sums and products in 64 bits to see whether they overflow, but asserts nothing without debug.
    """
    try:
        from triton.runtime import interpreter
        from triton.runtime.interpreter import _get_np_dtype, _LangPatchScope, _patch_lang, interpreter_builder, tl
    except ImportError:  # no Triton, or one whose interpreter has other parts and stays as it is
        return
    patched: set[int] = set()  # which of the modules are, for the launch that runs
    dtypes: dict[str, object] = {}

    @functools.cache
    def modules_of(fn: Callable) -> set[int]:
        return {id(value) for value in fn.__globals__.values()} & {id(tl), id(tl.core)}

    def patch_once(fn: Callable) -> _LangPatchScope:
        modules = modules_of(fn)
        if modules and modules <= patched:
            return _LangPatchScope()
        scope = _patch_lang(fn)
        restore = scope.restore

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        patched.update(modules)
        return scope

    def find_dtype_once(dtype: object) -> object:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = _get_np_dtype(dtype)
        return dtypes[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, find_dtype_once
    options = interpreter_builder.options
    interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)
