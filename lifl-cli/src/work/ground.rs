//! What a role stands on: who it is, its arena, the frames that it posts, the arenas that it reads. In a running worker that
//! is its [`Link`](super::link::Link); in tests it is whatever lets a whole tree run in one thread.

use std::sync::Arc;

use lifl_common::arena::{OwnedArena, PeerArena};
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::{ArenaId, WorkerId};

/// See the [module](self).
pub(super) trait Ground {
    /// Who this worker is.
    fn id(&self) -> WorkerId;

    /// Who decides what it does.
    fn coordinator(&self) -> WorkerId;

    /// Its arena, and the top's second one, for what its optimizer remembers.
    fn arenas(&mut self) -> (&mut OwnedArena, Option<&mut OwnedArena>);

    /// Its arena.
    fn arena(&mut self) -> &mut OwnedArena {
        self.arenas().0
    }

    /// The second one.
    fn state(&mut self) -> Option<&mut OwnedArena> {
        self.arenas().1
    }

    /// Takes back everything that is lent to a worker that is gone.
    fn take_back(&mut self, from: WorkerId) {
        let (arena, state) = self.arenas();
        arena.take_back(from);
        if let Some(state) = state {
            state.take_back(from);
        }
    }

    /// Frames that are to be sent, as they were posted.
    fn outbox(&mut self) -> &mut Vec<Frame>;

    /// Puts them into the order in which they are sent: to the coordinator first, since nobody else is to know what it decides on
    /// before it does, and to each of the others everything at once, so that it wakes for all of it.
    fn order(&mut self) {
        let coordinator = self.coordinator();
        self.outbox()
            .sort_by_key(|frame| (frame.to != coordinator, frame.to));
    }

    /// Another worker's arena; `None` if the job has none of that number, as a rule because its owner is gone.
    ///
    /// # Errors
    /// If it cannot be had.
    async fn peer(&mut self, arena: ArenaId) -> anyhow::Result<Option<Arc<PeerArena>>>;

    /// The own arena as others see it.
    ///
    /// # Errors
    /// If it cannot be had.
    async fn own(&mut self) -> anyhow::Result<Arc<PeerArena>>;

    /// Has a frame sent: at the latest when what has come has been dealt with.
    fn post(&mut self, to: WorkerId, kind: FrameKind, frame: Frame) {
        let frame = Frame {
            to,
            from: self.id(),
            kind: kind as u16,
            ..frame
        };
        self.outbox().push(frame);
    }
}
