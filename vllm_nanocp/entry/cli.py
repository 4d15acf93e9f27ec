# SPDX-License-Identifier: Apache-2.0
"""``--nanocp`` and ``--nanocp-config`` on vLLM's command line, and where the engine configuration is made.

Touches, in vLLM 0.32: ``EngineArgs.add_cli_args``, ``.from_cli_args`` and ``.create_engine_config``
(``vllm/engine/arg_utils.py``) and ``ServeSubcommand.validate`` (``vllm/entrypoints/cli/serve.py``), which runs
before anything is started.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

from .. import config as nanocp_config
from ..compat import unsupported_reason
from ..errors import NanoCPConfigError
from ..wrapping import to_wrap, wraps
from . import exit_code


def _json_object(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text!r}") from error


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        title="NanoCP",
        description="Request-level context parallelism: one scheduler over all data-parallel ranks, the KV cache of a "
        "long request spread over several of them.",
    )
    group.add_argument(
        "--nanocp",
        action=argparse.BooleanOptionalAction,  # `--no-nanocp` takes back what a file says, as of vLLM's flags
        default=False,
        help="Serve all data-parallel ranks as one engine, long requests sharded over them.",
    )
    group.add_argument(
        "--nanocp-config",
        type=_json_object,
        default=None,
        metavar="JSON",
        help='Settings, for example \'{"segment_size": 65536, "max_degree": 4}\'. '
        "ranks: of LLM(...); here --data-parallel-size says it. "
        'segment_size: tokens a shard should hold before another rank is used, or "auto". '
        "max_degree: most ranks one request may use (default: all). "
        f"placement: {' or '.join(nanocp_config.PLACEMENTS)}. exchange: {' or '.join(nanocp_config.EXCHANGES)}. "
        "moves, parallel_prefill, prefill_gap, graph_capacities, scheduler_processes: see the user guide. "
        "decode_bench: for benchmarks only, answers are meaningless.",
    )


def fold(args: argparse.Namespace) -> None:
    """Turn the two flags into ``additional_config``. Idempotent.

    The data-parallel size stays (or becomes) the number of ranks: ``vllm serve`` starts as many API servers, and
    ``engine_config.make`` lets vLLM derive what depends on it before there is one engine.

    Raises:
        NanoCPConfigError: a bad value, or a vLLM version that is not supported.
    """
    given = getattr(args, "nanocp", False)
    settings = getattr(args, "nanocp_config", None)
    if settings is not None and not given:
        raise NanoCPConfigError("nanocp: --nanocp-config has no effect without --nanocp; add --nanocp or leave it out")
    additional = getattr(args, "additional_config", None)
    if nanocp_config.wanted(additional):
        if given:
            raise NanoCPConfigError(
                'nanocp: settings come from --nanocp-config and from --additional-config {"nanocp": ...}; give only one'
            )
        raw = additional[nanocp_config.KEY]
    elif given:
        raw = {} if settings is None else settings
    else:
        return
    _require_supported()
    from .machines import all_here
    from .refusals import check_command, check_environment, check_flags

    config = nanocp_config.parse(raw, args.data_parallel_size)
    check_command(getattr(args, "subparser", None))
    all_here(args, config.ranks)
    check_flags(args)
    check_environment()
    args.additional_config = {**(additional or {}), nanocp_config.KEY: config.to_dict()}
    args.data_parallel_size = 1 if _rust_frontend() else config.ranks
    args.nanocp, args.nanocp_config = False, None


def _rust_frontend() -> bool:
    """Whether ``vllm serve`` hands its arguments to vLLM's Rust front-end, which looks for so many engines."""
    import vllm.envs as envs

    return bool(envs.VLLM_USE_RUST_FRONTEND and envs.VLLM_RUST_FRONTEND_PATH)


def _require_supported() -> None:
    import vllm

    reason = unsupported_reason(vllm.__version__)
    if reason is not None:
        raise NanoCPConfigError(reason)


def _or_exit(call: Callable[[], Any]) -> Any:
    """On the command line a refusal is one line and an exit code, not a traceback."""
    try:
        return call()
    except NanoCPConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def install() -> None:
    """Wrap vLLM's entry points. Every wrapper passes through unless the user asked for nanocp."""
    from vllm.engine.arg_utils import EngineArgs

    create = to_wrap(EngineArgs, "create_engine_config", __name__)
    if create is None:
        return
    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = EngineArgs.from_cli_args.__func__  # type: ignore[attr-defined]

    @functools.wraps(add_cli_args)
    def add(parser: Any) -> Any:
        parser = add_cli_args(parser)
        _add_arguments(parser)
        _install_serve()
        return parser

    @functools.wraps(from_cli_args)
    def from_args(cls: Any, args: argparse.Namespace) -> Any:
        _or_exit(lambda: fold(args))
        engine_args = from_cli_args(cls, args)
        if nanocp_config.wanted(engine_args.additional_config):
            # The settings have the number of ranks, and ``LLM``, which some commands make of this, takes no other size.
            engine_args.data_parallel_size = 1
        return engine_args

    @wraps(create, __name__)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not nanocp_config.wanted(self.additional_config):
            return create(self, *args, **kwargs)
        _require_supported()
        from .engine_config import make

        return make(self, lambda: create(self, *args, **kwargs))

    EngineArgs.add_cli_args = staticmethod(add)  # type: ignore[method-assign,assignment]
    EngineArgs.from_cli_args = classmethod(from_args)  # type: ignore[method-assign,assignment]
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def _install_serve() -> None:
    """``vllm serve``: fold before its command runs; a refusal while it starts is one line."""
    serve = sys.modules.get("vllm.entrypoints.cli.serve")
    command = getattr(serve, "ServeSubcommand", None)
    validate = None if command is None else to_wrap(command, "validate", __name__)
    if command is None or validate is None:
        return

    @wraps(validate, __name__)
    def validate_and_fold(self: Any, args: argparse.Namespace) -> None:
        _or_exit(lambda: fold(args))
        if nanocp_config.wanted(getattr(args, "additional_config", None)):
            sys.excepthook = _excepthook
            if hasattr(args, "dispatch_function"):
                args.dispatch_function = exit_code.watched(args.dispatch_function)
        validate(self, args)

    command.validate = validate_and_fold


def _excepthook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if isinstance(error, NanoCPConfigError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)
