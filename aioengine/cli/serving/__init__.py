"""What ``aioengine serve`` does beside serving: telling systemd and the log, and ending in order."""
