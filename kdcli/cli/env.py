"""kdcli env"""

from typing import Annotated

import typer


def env(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> int:
    """Show what a bug report needs: versions, devices, threads, folders.

    \b
    Examples:
      kdcli env
      kdcli env --json
    """
    import os

    import onnxruntime
    from rich.table import Table

    from kdcli.cli.console import emit
    from kdcli.errors import InputError
    from kdcli.files import cache_dir
    from kdcli.machine import gpu_count, resolve_precision, usable_processors, versions

    try:
        cache = str(cache_dir())
    except InputError as error:
        cache = error.message
    document = {
        **versions(),
        "gpus": str(gpu_count()),
        "processors": str(usable_processors()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "precision": resolve_precision("auto", "auto"),
        "onnxruntime_providers": ", ".join(onnxruntime.get_available_providers()),
        "cache": cache,
        "KDCLI_DATA_DIR": os.environ.get("KDCLI_DATA_DIR", "not set"),
        "HF_HOME": os.environ.get("HF_HOME", "not set"),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "not set"),
    }
    table = Table(show_header=False)
    for key, value in document.items():
        table.add_row(key, value)
    emit(document, table=table, as_json=as_json)
    return 0
