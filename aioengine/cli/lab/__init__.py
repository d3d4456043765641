"""``aioengine lab``: the commands of the policy lab."""
