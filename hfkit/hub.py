"""Reach the Hugging Face Hub within seconds, and explain its errors in one line; what is kept beside its downloads."""

from pathlib import Path

from hfkit.errors import HfkitError, first_line, hide_passwords
from hfkit.storage import check_home

PROBE_SECONDS = 2


def reach_hub(name: str) -> None:
    """Raise HfkitError within seconds if the Hub, which has `name`, cannot be reached. Its own client takes 23."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception as error:  # whatever answers may not be a Hub, so more than httpx's errors
        raise HfkitError(explain_hub_error(error, name, None)) from error


def endpoint() -> str:
    """The address of the Hub, without a user and password."""
    from huggingface_hub import constants

    return hide_passwords(constants.ENDPOINT)


def cache_folder() -> Path:
    """Where hfkit keeps what it can make again. Raises HfkitError without a home directory."""
    from huggingface_hub import constants

    check_home(folder := Path(constants.HF_HOME) / "hfkit")
    return folder


def explain_hub_error(error: Exception, name: str, revision: str | None, *, started: bool = False) -> str:
    """One line for an error of the Hub's client.

    started: part of the download was there already, so that running it again continues.
    """
    import httpx2
    from huggingface_hub import errors

    hub = endpoint()
    match error:
        case errors.GatedRepoError():
            return f"{name} is gated: accept its terms on {hub}/{name} and log in with 'hf auth login'"
        case errors.RevisionNotFoundError():
            return f"{name} has no revision {revision!r}: see {hub}/{name}/tree/main"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403, 404):
            return f"no model {name!r}: neither a folder here nor on {hub} (a private one needs 'hf auth login')"
        case errors.HfHubHTTPError():
            return f"the Hub answers with HTTP status {error.response.status_code} ({hub}, {name}): try later"
        case _ if started:
            return f"the download of {name} broke off ({hub}): {first_line(error)}; run it again to continue"
        case httpx2.HTTPError() | httpx2.InvalidURL() | OSError():
            return (
                f"the Hub cannot be reached ({hub}): go online, set HF_ENDPOINT to a mirror, "
                f"or use what is here: -m bundled, or a local folder ({name} is not cached)"
            )
        case _:
            return f"the server at {hub} is not a Hub: check the network and HF_ENDPOINT"
