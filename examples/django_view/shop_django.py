"""A Django project in a file: a view writes an order with the ORM and starts its workflow in the same transaction.

So there is no order without a workflow, and no workflow without an order, whatever fails in between.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import django
import psycopg.conninfo
from django.conf import settings
from django.core.management import execute_from_command_line
from django.db import connection, models, transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path

from perdure import App, step

URL = os.environ["PERDURE_DATABASE_URL"]
_PARTS: dict[str, Any] = psycopg.conninfo.conninfo_to_dict(URL)

settings.configure(
    DEBUG=True,
    SECRET_KEY="of an example",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": _PARTS.get("dbname", "postgres"),
            "USER": _PARTS.get("user", ""),
            "PASSWORD": _PARTS.get("password", ""),
            "HOST": _PARTS.get("host", ""),
            "PORT": str(_PARTS.get("port", "")),
        }
    },
)
django.setup()

app = App("shop", schema=os.environ.get("PERDURE_SCHEMA", "perdure"))


class Order(models.Model):
    """A row of the shop's own table."""

    item = models.TextField()
    parcel = models.TextField(null=True)

    class Meta:
        app_label = "shop"
        db_table = os.environ.get("SHOP_TABLE", "shop_order")


@step(idempotent=True)  # a plain function: it runs in a thread, where the ORM works
def ship(order_id: int) -> str:
    order = Order.objects.get(pk=order_id)
    order.parcel = f"parcel with {order.item}"
    order.save()
    connection.close()  # the thread has one of its own
    return str(order.parcel)


@app.workflow
async def fulfil(order_id: int) -> str:
    return await ship(order_id)


def place(request: HttpRequest) -> JsonResponse:
    """Both or neither: the row, and the workflow that sees to it."""
    given = json.loads(request.body)
    with transaction.atomic():
        order = Order.objects.create(item=given["item"])
        handle = app.blocking.start(fulfil(order.pk), key=f"order {order.pk}", connection=connection)
        if given["item"] == "nothing":
            raise ValueError("nobody sells that")  # and the workflow is gone, too
    return JsonResponse({"order": order.pk, "workflow": str(handle.id)})


def show(request: HttpRequest, order_id: int) -> JsonResponse:
    handle = app.blocking.find(fulfil, key=f"order {order_id}")
    return JsonResponse({"status": None if handle is None else handle.status().value})


urlpatterns = [path("orders", place), path("orders/<int:order_id>", show)]


def create_table() -> None:
    with connection.schema_editor() as editor:
        editor.create_model(Order)


if __name__ == "__main__":
    execute_from_command_line(sys.argv)
