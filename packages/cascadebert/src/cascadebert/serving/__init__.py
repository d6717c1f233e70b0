"""The HTTP service: stations with a queue each, calls on their way through them, routes, a process."""
