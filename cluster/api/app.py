"""Puts the HTTP application together. Called by the ApiServer actor's process and by tests."""

from starlette.types import ASGIApp

from cluster.api.door import Door
from cluster.api.routes import Routes
from cluster.api.service import Service


def create_app(service: Service) -> ASGIApp:
    """Return the whole application over `service`: HTTP only, no lifespan, no websockets."""
    return Door(Routes(service), service)
