package rollout

// body is what an assembler knows of the memory that the rows of a batch lie in.
// Only a batch of whole groups has one: of other batches no row is left in the
// body. It is given back on the usual way of its groups alone: all trained, and
// none in a snapshot, which somebody may be writing. On any other way it is left
// to the garbage collector: a group that is dropped may be in a step under way.
type body struct {
	groups int  // that are not trained yet
	read   bool // by a snapshot, nobody knows for how long
	free   func()
}

// trained says that a group's rows are needed no more.
func (b *body) trained() {
	if b.groups--; b.groups == 0 && !b.read {
		b.free()
	}
}
