"""The making: trains adapters on the serving base. Imports base and adapters, never engine or server."""
