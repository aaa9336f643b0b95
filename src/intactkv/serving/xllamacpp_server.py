"""llama-server from xllamacpp's wheel, where none is installed: `python -m intactkv.serving.xllamacpp_server …`.

It takes the options below, named as llama-server's own.
"""

from __future__ import annotations

import argparse
import signal


def main() -> None:
    """Serve until a signal ends it."""
    import xllamacpp as x

    parser = argparse.ArgumentParser(prog="llama-server (xllamacpp)", allow_abbrev=False)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--slot-save-path", default="")
    parser.add_argument("-cram", "--cache-ram", type=int, default=0)
    parser.add_argument("-c", "--ctx-size", type=int, default=0)
    parser.add_argument("-np", "--parallel", type=int)
    parser.add_argument("-kvu", "--kv-unified", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-ngl", "--n-gpu-layers", type=int)
    parser.add_argument("-fa", "--flash-attn", choices=["on", "off", "auto"], default="auto")
    parser.add_argument("-ctk", "--cache-type-k", default="f16")
    parser.add_argument("-ctv", "--cache-type-v", default="f16")
    parser.add_argument("--swa-full", action="store_true")
    parser.add_argument("-a", "--alias")
    parser.add_argument("--api-key")
    parser.add_argument("--metrics", action="store_true")
    given = parser.parse_args()

    params = x.CommonParams()
    params.model.path, params.hostnames, params.port = given.model, [given.host], given.port
    params.slot_save_path, params.cache_ram_mib, params.n_ctx = given.slot_save_path, given.cache_ram, given.ctx_size
    params.endpoint_slots, params.endpoint_metrics = True, given.metrics
    automatic = given.parallel is None  # as llama-server: then 4 slots that share the cache
    params.n_parallel = 4 if automatic else given.parallel
    params.kv_unified = automatic if given.kv_unified is None else given.kv_unified
    params.swa_full = given.swa_full
    flash = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}[given.flash_attn]
    params.flash_attn_type = getattr(x.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
    params.cache_type_k = getattr(x.ggml_type, f"GGML_TYPE_{given.cache_type_k.upper()}")
    params.cache_type_v = getattr(x.ggml_type, f"GGML_TYPE_{given.cache_type_v.upper()}")
    if given.threads is not None:
        params.cpuparams.n_threads = given.threads
    if given.n_gpu_layers is not None:
        params.n_gpu_layers = given.n_gpu_layers
    if given.alias is not None:
        params.model_alias = {given.alias}
    if given.api_key is not None:
        params.api_keys = [given.api_key]
    server = x.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
