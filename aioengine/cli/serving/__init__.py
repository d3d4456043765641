"""Parts of ``aioengine serve`` around the server: reports to systemd and the log, and an orderly end."""
