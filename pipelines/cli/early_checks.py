"""What can be told to be wrong with a command before the libraries load, which takes ten seconds.

The verbs themselves check all of this again, for whoever calls them from Python.
"""

import os
from typing import Any

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.cli.arguments import Command
from vqbeam.pipelines.cli.verbs import VERBS
from vqbeam.pipelines.places import check_output


def check(command: Command) -> None:
    """Looks at the folders, files and labels that a command names.

    Raises:
        VqbeamError: One of them is not there, or not such as the verb needs.
    """
    verb, arguments = VERBS[command.verb], command.arguments
    if verb.outputs and arguments["output"]:
        check_output(arguments["output"], verb.outputs)
    if "stages" in arguments:
        _check_stages(arguments)
    elif verb.needs:
        _check_run(verb.needs, arguments)


def _check_stages(arguments: dict[str, Any]) -> None:
    run_dir, data = arguments["run_dir"], arguments["config"].data
    if os.path.isfile(run_dir):
        raise VqbeamError(f"{run_dir} is a file, not a folder; choose another --run-dir")
    kind, _, path = data.source.partition(":")
    if "prepare" in arguments["stages"] and kind == "folder" and "://" not in path:
        from vqbeam.pipelines.sources.folder import check_folder

        check_folder(path)


def _check_run(needs: tuple[str, ...], arguments: dict[str, Any]) -> None:
    from vqbeam.pipelines.sampling.labels import parse_label
    from vqbeam.vqvae.storage.labels import Labels
    from vqbeam.vqvae.storage.run_folder import RunFolder

    run = RunFolder(arguments["run_dir"])
    run.load_config()
    manifests = {stage: run.require(stage) for stage in needs}
    named = [arguments.get(name) for name in ("label", "start", "end")]
    for label in [*named, *(arguments.get("labels") or [])]:
        if label is not None:
            parse_label(label, Labels.of(manifests["train-prior"]))
