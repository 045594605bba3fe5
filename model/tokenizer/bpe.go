package tokenizer

import "container/heap"

// byteRune is GPT-2's reversible map from bytes to printable characters:
// printable Latin-1 stays, the other 68 bytes become U+0100 onwards.
var byteRune, runeByte = func() (to [256]rune, from map[rune]byte) {
	from = make(map[rune]byte, 256)
	next := rune(256)
	for b := range 256 {
		r := rune(b)
		if printable := b >= '!' && b <= '~' || b >= 0xA1 && b <= 0xAC || b >= 0xAE; !printable {
			r = next
			next++
		}
		to[b], from[r] = r, byte(b)
	}
	return to, from
}()

// appendBytes appends the bytes that a token stands for. A token with a
// character outside the map (an added one) stands for its own text.
func appendBytes(dst []byte, token string) []byte {
	mark := len(dst)
	for _, r := range token {
		b, ok := runeByte[r]
		if !ok {
			return append(dst[:mark], token...)
		}
		dst = append(dst, b)
	}
	return dst
}

// bpe is byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) over bytes.
type bpe struct {
	vocab  map[string]int32
	merges map[pair]merge
	byteID [256]int32 // -1: the vocabulary lacks the byte
	whole  bool       // a piece that is a token is taken as it is
}

type pair struct{ left, right int32 }

type merge struct {
	rank int32 // lower merges first
	id   int32 // the token that the pair becomes
}

// symbol is a node of a doubly linked list over a slice; -1 ends it.
type symbol struct {
	id         int32
	prev, next int
	dead       bool
}

// candidate is a pair that can merge; it is stale when either side has changed.
type candidate struct {
	merge
	at          int
	left, right int32
}

// queue orders candidates by rank, then from left to right.
type queue []candidate

func (q queue) Len() int      { return len(q) }
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q queue) Less(i, j int) bool {
	return q[i].rank < q[j].rank || q[i].rank == q[j].rank && q[i].at < q[j].at
}
func (q *queue) Push(x any) { *q = append(*q, x.(candidate)) }
func (q *queue) Pop() any {
	old := *q
	x := old[len(old)-1]
	*q = old[:len(old)-1]
	return x
}

// encode appends the ids of one piece, in O(n log n) of its bytes.
func (b *bpe) encode(dst []int32, piece string) []int32 {
	if b.whole {
		name := make([]rune, len(piece))
		for i := range len(piece) {
			name[i] = byteRune[piece[i]]
		}
		if id, ok := b.vocab[string(name)]; ok {
			return append(dst, id)
		}
	}
	list := make([]symbol, 0, len(piece))
	for i := range len(piece) {
		if id := b.byteID[piece[i]]; id >= 0 {
			list = append(list, symbol{id: id, prev: len(list) - 1, next: len(list) + 1})
		}
	}
	if len(list) == 0 {
		return dst
	}
	list[len(list)-1].next = -1
	q := make(queue, 0, len(list))
	consider := func(at int) {
		if at < 0 || list[at].next < 0 {
			return
		}
		l, r := list[at].id, list[list[at].next].id
		if m, ok := b.merges[pair{l, r}]; ok {
			heap.Push(&q, candidate{m, at, l, r})
		}
	}
	for i := range list {
		consider(i)
	}
	for len(q) > 0 {
		c := heap.Pop(&q).(candidate)
		s := &list[c.at]
		if s.dead || s.id != c.left || s.next < 0 || list[s.next].id != c.right {
			continue
		}
		gone := s.next
		s.id, s.next = c.id, list[gone].next
		list[gone].dead = true
		if s.next >= 0 {
			list[s.next].prev = c.at
		}
		consider(s.prev)
		consider(c.at)
	}
	for i := 0; i >= 0; i = list[i].next {
		dst = append(dst, list[i].id)
	}
	return dst
}
