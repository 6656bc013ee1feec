"""The credentials of one migration: what ``tls`` of an order means to each machine."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any, Final

from postcopy.client.qmp import QmpConnection
from postcopy.errors import PostcopyError

_PARAMETERS: Final = ("tls-creds", "tls-hostname")


class Credentials:
    """An object in each machine, as long as the migration lasts.

    :param folder: of certificates of both hosts; None: nothing is encrypted, and no machine gets any.
    :param hostname: the name in the destination's certificate; None: that of the URI.
    """

    def __init__(self, folder: str | None, hostname: str | None) -> None:
        self._folder = folder
        self._hostname = hostname
        self._name = f"postcopy-{os.urandom(4).hex()}"
        self._machines: list[QmpConnection] = []  # that have the object
        self._before: list[tuple[QmpConnection, Mapping[str, Any]]] = []

    @property
    def typed(self) -> str:
        """The options that mean these credentials, as typed after a command; empty: there are none."""
        options = {"--tls": self._folder, "--tls-hostname": self._hostname}
        return "".join(f" {name} {quote(value)}" for name, value in options.items() if value)

    async def give(self, machine: QmpConnection, *, destination: bool) -> Mapping[str, Any]:
        """Give a machine its object; return the parameters that use it.

        :raises Refused: it refuses the certificates.
        """
        if self._folder is None:
            return {}
        arguments = {
            "qom-type": "tls-creds-x509",
            "id": self._name,
            "dir": str(Path(self._folder).absolute()),
            "endpoint": "server" if destination else "client",
            "verify-peer": True,
        }
        await machine.execute("object-add", arguments)
        self._machines.append(machine)
        hostname = "" if destination else self._hostname or ""
        return {"tls-creds": self._name, "tls-hostname": hostname}

    async def use(self, source: QmpConnection, destination: QmpConnection) -> None:
        """Have both machines encrypt their next connection, for a recovery.

        :raises Refused: one of them refuses; both are as they were.
        """
        if self._folder is None:
            return
        try:
            for machine in (destination, source):
                found = await machine.execute("query-migrate-parameters")
                wanted = await self.give(machine, destination=machine is destination)
                self._before.append((machine, {name: found.get(name, "") for name in _PARAMETERS}))
                await machine.execute("migrate-set-parameters", wanted)
        except BaseException:
            await self.take_back()
            raise

    async def take_back(self) -> None:
        """Remove the objects, and restore what :meth:`use` has changed; harmless when done."""
        before, self._before = self._before, []
        machines, self._machines = self._machines, []
        # A machine that refuses is gone, or has ended.
        for machine, parameters in before:
            with contextlib.suppress(PostcopyError):
                await machine.execute("migrate-set-parameters", parameters)
        for machine in machines:
            with contextlib.suppress(PostcopyError):
                await machine.execute("object-del", {"id": self._name})
