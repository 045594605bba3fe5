package rollout

// ledger remembers what belongs to a name for ever. Records are only added, so
// that a copy of the list as it is now costs nothing.
type ledger[T any] struct {
	list []record[T]
	at   map[digest]uint32 // place in list
}

type record[T any] struct {
	name  digest
	value T
}

// reserve makes room for n names in an empty ledger.
func (l *ledger[T]) reserve(n int) {
	l.list = make([]record[T], 0, n)
	l.at = make(map[digest]uint32, n)
}

// add enters a name that is not there yet; false when it is.
func (l *ledger[T]) add(name digest, value T) bool {
	if l.at == nil {
		l.at = map[digest]uint32{}
	}
	if _, there := l.at[name]; there {
		return false
	}
	l.at[name] = uint32(len(l.list))
	l.list = append(l.list, record[T]{name, value})
	return true
}

func (l *ledger[T]) get(name digest) (v T, ok bool) {
	at, ok := l.at[name]
	if !ok {
		return v, false
	}
	return l.list[at].value, true
}
