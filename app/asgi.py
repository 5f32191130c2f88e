"""What a server imports: `uvicorn app.asgi:app`, `gunicorn -k uvicorn_worker.UvicornWorker app.asgi:app`."""

from app.main import create_app
from app.settings import load_or_exit

app = create_app(load_or_exit())
