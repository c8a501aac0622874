"""What `ranklog doctor` looks at. A check takes the `Site` and yields findings; none writes or needs root.

    site       who asks, the settings and the daemon's answer; what is wrong with environment and config file
    daemon     socket, versions, limits of the process, clock
    disks      state directory, journals, spools, shared memory: owner, filesystem, room
    contents   store, token, and what lies on this node and waits for somebody

Only `ranklogd`'s own modules are needed, none of the packages of the extra `daemon`.
"""
