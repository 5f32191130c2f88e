"""The application that Hardstand deploys by default: posts, kept in SQLite or PostgreSQL.

`app.asgi:app` is what a server imports; `app.main.create_app` makes an application with settings of your own.
"""
