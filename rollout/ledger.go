package rollout

import (
	"encoding/binary"
	"hash/maphash"
)

// ledger remembers what belongs to a name for ever. It is made for millions of
// names: records lie in chunks that never move, and the index holds their places
// only (about 8 bytes a name, by open addressing).
type ledger[T any] struct {
	records records[T]
	slots   []uint32 // place + 1, 0 for a free one; a power of two
	seed    maphash.Seed
}

// record is a name and what belongs to it.
type record[T any] struct {
	name  digest
	value T
}

// records are a ledger's, in the order in which they were added. Since they are
// only added, a copy of the struct is the list as it is now.
type records[T any] struct {
	chunks []*[chunkSize]record[T]
	n      int
}

const chunkSize = 1024

func (r *records[T]) at(i int) *record[T] { return &r.chunks[i/chunkSize][i%chunkSize] }

func (r *records[T]) add(x record[T]) {
	if r.n == len(r.chunks)*chunkSize {
		r.chunks = append(r.chunks, new([chunkSize]record[T]))
	}
	*r.at(r.n) = x
	r.n++
}

// slot is where a name is, or where it would be entered.
func (l *ledger[T]) slot(name digest) int {
	mask := len(l.slots) - 1
	for at := int(maphash.Comparable(l.seed, name)) & mask; ; at = (at + 1) & mask {
		if p := l.slots[at]; p == 0 || l.records.at(int(p-1)).name == name {
			return at
		}
	}
}

// add enters a name that is not there yet; false when it is.
func (l *ledger[T]) add(name digest, value T) bool {
	if 4*(l.records.n+1) > 3*len(l.slots) {
		l.grow()
	}
	at := l.slot(name)
	if l.slots[at] != 0 {
		return false
	}
	l.records.add(record[T]{name, value})
	l.slots[at] = uint32(l.records.n)
	return true
}

// grow doubles the index.
func (l *ledger[T]) grow() {
	if l.slots == nil {
		l.seed = maphash.MakeSeed() // so that nobody can choose names that collide
	}
	l.slots = make([]uint32, max(64, 2*len(l.slots)))
	for i := range l.records.n {
		l.slots[l.slot(l.records.at(i).name)] = uint32(i + 1)
	}
}

func (l *ledger[T]) get(name digest) (v T, ok bool) {
	if l.records.n == 0 {
		return v, false
	}
	p := l.slots[l.slot(name)]
	if p == 0 {
		return v, false
	}
	return l.records.at(int(p - 1)).value, true
}

// names are short strings in one piece of memory: each after its length.
type names string

func makeNames(list []string) names {
	size := 0
	for _, s := range list {
		size += len(s) + 1
	}
	text := make([]byte, 0, size)
	for _, s := range list {
		text = append(binary.AppendUvarint(text, uint64(len(s))), s...)
	}
	return names(text)
}

// all yields the names in order.
func (n names) all(yield func(string) bool) {
	for text := string(n); text != ""; {
		size, skip := uint64(text[0]), 1
		if size >= 0x80 {
			var head [binary.MaxVarintLen64]byte
			size, skip = binary.Uvarint(head[:copy(head[:], text)])
		}
		text = text[skip:]
		if !yield(text[:size]) {
			return
		}
		text = text[size:]
	}
}

func (n names) len() (count int) {
	for range n.all {
		count++
	}
	return count
}
