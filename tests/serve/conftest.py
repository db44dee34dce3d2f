from tests.predict.conftest import whole, work  # noqa: F401
