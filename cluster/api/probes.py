"""`/health`, `/ready`, `/metrics`, `/metrics/targets`, `/v1/models`: what is asked of the server itself."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from cluster.api.answers import Model, ModelList, Status, TargetGroup
from cluster.api.calls import check_model
from cluster.api.errors import ApiError
from cluster.api.request_ids import header
from cluster.api.service import Service


class Probes:
    """Endpoints without a body. Only `/v1/models` asks for a key."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request) -> Response:
        """Answer 200 while the event loop runs, whatever the replicas do."""
        return _json(Status("ok"))

    async def ready(self, request: Request) -> Response:
        """Answer 200 when a replica takes work and the server is not draining, else 503 with the reason."""
        reason = self._service.router.ready()
        if self._service.lifecycle.is_draining:
            reason = "draining"
        return _json(Status("ready")) if reason is None else _json(Status("not ready", reason), 503)

    async def metrics(self, request: Request) -> Response:
        """Answer this process's metrics."""
        try:
            body, media_type = await self._service.threads.run_metrics(self._service.recorder.exposition)
        except TimeoutError:
            raise ApiError(503, "The metrics were not ready in time.", code="metrics_timeout") from None
        return Response(body, headers={"content-type": media_type})

    async def metrics_targets(self, request: Request) -> Response:
        """Answer every process that serves metrics, in Prometheus' http_sd form."""
        return _json(
            [TargetGroup([target.address], target.labels) for target in self._service.scrape_targets()]
        )

    async def models(self, request: Request) -> Response:
        """Answer the list of the one model served."""
        self._service.authenticator.tenant(header(request.scope, b"authorization"))
        return _json(ModelList(data=[self._model()]))

    async def model(self, request: Request) -> Response:
        """Answer one model, 404 for any but the one served."""
        self._service.authenticator.tenant(header(request.scope, b"authorization"))
        check_model(self._service, request.path_params["name"])
        return _json(self._model())

    def _model(self) -> Model:
        service = self._service
        return Model(
            id=service.model.name,
            created=int(service.started_at_s),
            max_model_len=service.limits().context_len,
        )


def _json(record: msgspec.Struct | list[TargetGroup], status: int = 200) -> Response:
    return Response(msgspec.json.encode(record), status, media_type="application/json")
