"""The app: its settings, its parts and its doors."""

import sys
from typing import Any
from urllib.parse import urlsplit

from flask import Flask
from flask_migrate import Migrate
from jinja2 import StrictUndefined

from webapp import cli, config, logs
from webapp.page import words
from webapp.parts import Parts
from webapp.routes import api, assets, callbacks, guard, middleware, operator, watch
from webapp.storage import database
from webapp.storage.tables import db


def _log_exception(exc_info: Any) -> None:  # Flask's own line names the path, which may hold a token
    logs.log.error("exception", exc_info=exc_info)


def create_app() -> Flask:
    """The app, as the environment has it; raises `config.BadSetting`."""
    sys.excepthook = cli.tell_fault
    settings = config.load(config.environment())
    app = Flask(__name__, template_folder=config.ROOT / "templates", static_folder=None)
    app.log_exception = _log_exception  # type: ignore[method-assign]
    app.jinja_env.undefined = StrictUndefined
    app.jinja_env.filters.update(words.FOR_TEMPLATES)
    app.url_map.merge_slashes = False  # nobody is redirected, least of all a callback
    app.url_map.converters["id"] = middleware.JobId
    app.config["SQLALCHEMY_DATABASE_URI"] = settings.database_url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = database.engine_options(settings.database_url)
    db.init_app(app)
    Migrate(app, db, directory=str(config.MIGRATIONS))
    with app.app_context():
        app.extensions["milepost"] = Parts(app, settings)
    logs.set_up()
    callbacks.set_up(app)
    watch.set_up(app)
    middleware.set_up(app, settings)  # around both: what a proxy says counts there, too
    below = urlsplit(settings.public_url).path
    assets.set_up(app, below)
    for blueprint in (callbacks.bp, watch.bp, api.bp, api.metrics, guard.bp, operator.bp, cli.bp):
        app.register_blueprint(blueprint)
    return app
