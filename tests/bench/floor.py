"""A floor: the product's app with a route that verifies and reads a callback, and stores nothing."""

from time import time

from flask import Response, jsonify

from webapp.app import create_app
from webapp.parts import parts
from webapp.routes import callbacks
from webapp.rules.report import BadField, parse, read, sent_at

app = create_app()
app.view_functions["callbacks.receive"] = lambda: verify()


def verify() -> Response:
    arrived_at = time()
    settings = parts().settings
    body = callbacks._proved("X-Signature", settings.callback_keys)
    fields = parse(body)
    if abs(arrived_at - (sent_at(fields) or arrived_at)) > settings.callback_max_skew:
        raise BadField("sent_at")
    read(fields, body, arrived_at)
    return jsonify(received=True, duplicate=False)
