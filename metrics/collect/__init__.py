"""Listeners that count engine events, and gauges that are read from the engine at each scrape."""
