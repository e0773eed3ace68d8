"""The table of routes: which path and method goes to which endpoint, and 404 and 405 for the rest."""

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.api.chat import ChatCompletions
from cluster.api.completions import Completions
from cluster.api.errors import ApiError
from cluster.api.probes import Probes
from cluster.api.service import Service

ROUTE_KEY = "eyrie.route"
"""Where the scope says which route was taken: a path of the table, never a client's."""

PROBES = frozenset({"/health", "/ready", "/metrics", "/metrics/targets"})
"""Paths that machines ask for every few seconds."""

_MODELS = "/v1/models/"
_MODEL_PATH = "/v1/models/{model}"


Route = Mapping[str, ASGIApp]
"""The endpoints of a path by method; GET includes HEAD."""


class Routes:
    """Dispatches by exact path; `/v1/models/{model}` takes the rest of the path, for names with slashes."""

    def __init__(self, service: Service) -> None:
        probes = Probes(service)
        admin = service.cache_admin
        self._routes: Mapping[str, Route] = {
            "/v1/chat/completions": {"POST": ChatCompletions(service)},
            "/v1/completions": {"POST": Completions(service)},
            "/v1/models": {"GET": _app(probes.models)},
            _MODEL_PATH: {"GET": _app(probes.model)},
            "/health": {"GET": _app(probes.health)},
            "/ready": {"GET": _app(probes.ready)},
            "/metrics": {"GET": _app(probes.metrics)},
            "/metrics/targets": {"GET": _app(probes.metrics_targets)},
            "/admin/cache/store": {"POST": _app(admin.attach), "DELETE": _app(admin.detach)},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Dispatch one request; raise ApiError for an unknown path or method."""
        path: str = scope["path"]
        if path.startswith(_MODELS) and path != _MODELS:
            scope["path_params"] = {"name": path.removeprefix(_MODELS)}
            path = _MODEL_PATH
        route = self._routes.get(path)
        if route is None:
            allowed = ", ".join(self._routes)
            raise ApiError(404, f"There is no such path here; paths are {allowed}.", code="unknown_path")
        scope[ROUTE_KEY] = path
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        endpoint = route.get(method)
        if endpoint is None:
            allowed = " and ".join(route)
            raise ApiError(405, f"'{path}' takes {allowed} only.", code="method_not_allowed")
        await endpoint(scope, receive, send)


def _app(endpoint: Callable[[Request], Awaitable[Response]]) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        response = await endpoint(Request(scope, receive))
        await response(scope, receive, send)

    return answer
