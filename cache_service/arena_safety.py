"""ArenaSafety: what keeps the pages of an arena safe, each mechanism by its name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ArenaSafety:
    """Mechanisms of the arena. No configuration reaches it: tests switch one off and see a check fire."""

    leases: bool = True
    """A slot that a reader has leased is not given to another page."""
    epochs: bool = True
    """A reader takes a slot's bytes only while the slot's epoch is the one it was told (I7)."""
    fence: bool = True
    """A full fence stands between setting a mark and reading the other side's."""
    marks_first: bool = True
    """The evictor marks a slot before it looks for leases on it."""
    children_first: bool = True
    """No page is removed before the pages that continue it."""
    whole_pages: bool = True
    """A page is committed only once every rank has written its bundle's checksum."""
    grants: bool = True
    """Only the group that a slot was granted to, under that grant's epoch, commits or gives it up."""
    proven_death: bool = True
    """What a group holds is taken back only once all its processes are dead."""
    quiet: bool = True
    """Slots that a failed transfer may write still are not given to anybody else."""
    remote_leases: bool = True
    """Slots that a peer reads are leased in the server's own row."""
    verification: bool = True
    """What came from a peer is committed only if its bytes match their checksums."""
    fencing: bool = True
    """What was read under a lease that has ended counts for nothing, and its reader's incarnation leases no
    more."""
