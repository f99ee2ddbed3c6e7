"""Serves a finished run over HTTP: one endpoint, many experts, routed per request."""
