"""Triton's interpreter, made faster: it says less again for each operation, and computes what it computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable


def speed_up() -> None:
    """Takes from the interpreter two thirds of its time, spent on what it does in vain.

    It puts its functions into triton.language when a kernel is launched and again whenever that calls a function, which
    then changes nothing: what was replaced is no builtin any more. It makes a table of all dtypes to look up one. And
    it repeats integer sums and products in 64 bits to see whether they overflow, but asserts nothing without debug.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:  # tests of the kernels skip
        return
    languages = (interpreter.tl, interpreter.tl.core)
    patch, find_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    patched: set[int] = set()  # of the languages, by the launch that runs
    dtypes: dict[str, object] = {}

    @functools.cache
    def seen_by(fn: Callable) -> set[int]:
        modules = {id(value) for value in fn.__globals__.values()}
        return {i for i, language in enumerate(languages) if id(language) in modules}

    def patch_once(fn: Callable) -> object:
        if patched and seen_by(fn) <= patched:
            return None  # to a call within a launch, which has no use for it
        scope = patch(fn)
        restore = scope.restore

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        patched.update(seen_by(fn))
        return scope

    def find_dtype_once(dtype: object) -> object:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(dtype)
        return dtypes[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, find_dtype_once
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)
