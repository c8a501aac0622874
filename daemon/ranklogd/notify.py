"""sd_notify: tells systemd that the daemon is ready, alive or stopping. Nothing happens outside systemd.

Protocol: one datagram of KEY=value lines to the socket named by NOTIFY_SOCKET (man sd_notify(3)).
"""

import socket


class Notifier:
    """The service manager's notification socket, if there is one."""

    def __init__(self, address: str) -> None:
        # A leading @ stands for the zero byte of an abstract socket.
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def __call__(self, *lines: str) -> None:
        """Send `lines`; a manager that does not read is no reason to stop, nor to wait."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)  # noqa: FBT003
            try:
                sock.connect(self._address)
                sock.send("\n".join(lines).encode())
            except OSError:
                return
