package cuda

import (
	"cmp"
	"fmt"
	"slices"

	"trainerd/kernels"
)

const (
	// tileRows is the most stacked query rows of a tile, and the most keys of a block.
	tileRows = 64
	// pieceKeys is how many keys a piece of a cut tile attends to, at least.
	pieceKeys = 256
	// minSplitTiles is the fewest query tiles a piece of a cut key block walks over.
	minSplitTiles = 16

	// MaxSlots bounds Schedule.Slots.
	MaxSlots = 256
	// maxPartRows bounds Schedule.PartRows times the key heads.
	maxPartRows = 32768
)

// MaxPartRows bounds Schedule.PartRows for kv key heads.
func MaxPartRows(kv int) int { return max(1, maxPartRows/kv) }

// Schedule says which block of the attention kernels does what. The record
// formats are those of KERNELS.md. It depends on the segments and the numbers of
// heads alone, so the same micro-batch is always computed in the same order.
type Schedule struct {
	Tiles    []int32 // 8 ints each
	Items    []int32 // 12 ints each: forward work
	Combines []int32 // 4 ints each
	Order    []int32 // tiles, dearest first
	Works    []int32 // 8 ints each: dK/dV work; empty without backward
	Ranges   []int32 // 4 ints each
	Splits   []int32 // 4 ints each
	PartRows int     // partial rows of the forward pass, for each key head
	Slots    int     // partial key blocks of the backward pass, for each key head
}

// Ints returns the number of int32 of all arrays.
func (s *Schedule) Ints() int {
	return len(s.Tiles) + len(s.Items) + len(s.Combines) + len(s.Order) + len(s.Works) + len(s.Ranges) + len(s.Splits)
}

// segmentTiles is where one segment's tiles are in the list of all.
type segmentTiles struct{ first, count int }

// NewSchedule cuts the segments for h query and kv key heads. backward asks for
// Works, Ranges and Splits as well; segments then index one set of rows.
func NewSchedule(segments []kernels.Segment, h, kv int, backward bool) *Schedule {
	group := h / kv
	if kv <= 0 || group <= 0 || h%kv != 0 || group > tileRows {
		panic(fmt.Sprintf("attention schedule: H %d KV %d, expected H a multiple of KV, at most %d times it", h, kv, tileRows))
	}
	s := &Schedule{}
	where := s.cutQueries(segments, tileRows/group)
	s.cutForward(segments, where, group, MaxPartRows(kv))
	s.Order = make([]int32, len(s.Tiles)/8)
	for i := range s.Order {
		s.Order[i] = int32(i)
	}
	slices.SortStableFunc(s.Order, func(a, b int32) int { return cmp.Compare(s.visible(b), s.visible(a)) })
	if backward {
		s.cutBackward(segments, where)
	}
	return s
}

// cutQueries makes the tiles, at most `most` tokens each, cut evenly, in order of the segments.
func (s *Schedule) cutQueries(segments []kernels.Segment, most int) []segmentTiles {
	where := make([]segmentTiles, len(segments))
	for i, g := range segments {
		n := int(g.QLen)
		pieces := (n + most - 1) / most
		where[i] = segmentTiles{len(s.Tiles) / 8, pieces}
		for c := range pieces {
			from, to := c*n/pieces, (c+1)*n/pieces
			s.Tiles = append(s.Tiles, g.Q+int32(from), int32(to-from), g.K, int32(from)+1+g.KLen-g.QLen, g.Prefix, g.PrefixLen, 0, 0)
		}
	}
	return where
}

// visible returns how many keys the last token of a tile sees.
func (s *Schedule) visible(tile int32) int {
	t := s.Tiles[8*tile:][:8]
	return int(t[5]) + max(0, int(t[3]+t[1]-1))
}

// cutForward makes the forward items. The queries of a segment that fit into one
// tile and see many keys (decoding) are cut along the keys; the length of a
// piece depends on the neighbours only when the partial rows would not fit.
func (s *Schedule) cutForward(segments []kernels.Segment, where []segmentTiles, group, mostRows int) {
	alone := make([]bool, len(s.Tiles)/8)
	for _, w := range where {
		if w.count == 1 {
			alone[w.first] = true
		}
	}
	keys := pieceKeys
	for ; ; keys *= 2 {
		s.PartRows = 0
		for tile := range alone {
			if p := pieces(s.visible(int32(tile)), keys); alone[tile] && p > 1 {
				s.PartRows += p * int(s.Tiles[8*tile+1]) * group
			}
		}
		if s.PartRows <= mostRows {
			break
		}
	}
	part := int32(0)
	type item [12]int32
	var items []item
	for tile := range alone {
		t := s.Tiles[8*tile:][:8]
		total, n := s.visible(int32(tile)), 1
		if alone[tile] {
			n = pieces(total, keys)
		}
		if n > 1 {
			s.Combines = append(s.Combines, t[0], t[1], part, int32(n))
		}
		for p := range n {
			x := item{t[0], t[1], t[2], t[3], t[4], t[5], 0, int32(total), -1}
			if n > 1 {
				x[6], x[7], x[8] = int32(p*keys), int32(min(total, (p+1)*keys)), part
				part += t[1] * int32(group)
			}
			items = append(items, x)
		}
	}
	slices.SortStableFunc(items, func(a, b item) int { return cmp.Compare(b[7]-b[6], a[7]-a[6]) })
	for _, x := range items {
		s.Items = append(s.Items, x[:]...)
	}
}

// pieces returns how many pieces of the given length a tile is cut into; few keys are not worth a second pass.
func pieces(total, keys int) int {
	if total <= 2*keys {
		return 1
	}
	return (total + keys - 1) / keys
}

// run is a run of tiles that see a key block in one way.
type run struct{ tile, tiles, own int32 }

// cutBackward makes the work of dK and dV: one owner for every block of keys,
// or several with partial results where very many tiles see it.
func (s *Schedule) cutBackward(segments []kernels.Segment, where []segmentTiles) {
	type work struct {
		key, keys, slot int32
		runs            []run
		tiles           int
	}
	var works []work
	total := 0
	for _, b := range keyBlocks(segments) {
		w := work{key: b[0], keys: b[1] - b[0], slot: -1, runs: s.seenBy(segments, where, b[0], b[1])}
		for _, r := range w.runs {
			w.tiles += int(r.tiles)
		}
		if w.tiles > 0 {
			works = append(works, w)
			total += w.tiles
		}
	}
	// Blocks of more than `most` tiles are cut. They number at most total/most, so
	// that their pieces are at most 2·total/most <= MaxSlots.
	most := max(minSplitTiles, (2*total+MaxSlots-1)/MaxSlots)
	var all []work
	for _, w := range works {
		n := (w.tiles + most - 1) / most
		if n == 1 {
			all = append(all, w)
			continue
		}
		s.Splits = append(s.Splits, w.key, w.keys, int32(s.Slots), int32(n))
		for p := range n {
			from, to := p*w.tiles/n, (p+1)*w.tiles/n
			all = append(all, work{w.key, w.keys, int32(s.Slots), slice(w.runs, from, to), to - from})
			s.Slots++
		}
	}
	slices.SortStableFunc(all, func(a, b work) int { return cmp.Compare(b.tiles, a.tiles) })
	for _, w := range all {
		s.Works = append(s.Works, w.key, w.keys, int32(len(s.Ranges)/4), int32(len(w.runs)), w.slot, 0, 0, 0)
		for _, r := range w.runs {
			s.Ranges = append(s.Ranges, r.tile, r.tiles, r.own, 0)
		}
	}
}

// slice returns the tiles [from,to) of the runs laid end to end.
func slice(runs []run, from, to int) []run {
	var out []run
	at := 0
	for _, r := range runs {
		a, b := max(from, at), min(to, at+int(r.tiles))
		if a < b {
			out = append(out, run{r.tile + int32(a-at), int32(b - a), r.own})
		}
		at += int(r.tiles)
	}
	return out
}

// keyBlocks cuts the key rows in use at every edge of a segment's keys and
// prefix, and then evenly into at most tileRows rows: a tile sees a block as
// prefix wholly or not at all.
func keyBlocks(segments []kernels.Segment) [][2]int32 {
	var edges []int32
	for _, g := range segments {
		edges = append(edges, g.K, g.K+g.KLen, g.Prefix, g.Prefix+g.PrefixLen)
	}
	slices.Sort(edges)
	edges = slices.Compact(edges)
	var out [][2]int32
	for i := 0; i+1 < len(edges); i++ {
		n := int(edges[i+1] - edges[i])
		pieces := (n + tileRows - 1) / tileRows
		for c := range pieces {
			out = append(out, [2]int32{edges[i] + int32(c*n/pieces), edges[i] + int32((c+1)*n/pieces)})
		}
	}
	return out
}

// seenBy lists the runs of tiles that see key rows [from,to).
func (s *Schedule) seenBy(segments []kernels.Segment, where []segmentTiles, from, to int32) []run {
	var runs []run
	add := func(r run) {
		if n := len(runs); n > 0 && runs[n-1].own == r.own && runs[n-1].tile+runs[n-1].tiles == r.tile {
			runs[n-1].tiles += r.tiles
		} else if r.tiles > 0 {
			runs = append(runs, r)
		}
	}
	for i, g := range segments {
		w := where[i]
		if g.PrefixLen > 0 && from >= g.Prefix && to <= g.Prefix+g.PrefixLen {
			add(run{int32(w.first), int32(w.count), 0})
		}
		if from >= g.K && to <= g.K+g.KLen {
			// Tile c sees the first of the keys when its last token does.
			c := 0
			for c < w.count {
				t := s.Tiles[8*(w.first+c):][:8]
				if t[3]+t[1]-1 > from-g.K {
					break
				}
				c++
			}
			add(run{int32(w.first + c), int32(w.count - c), 1})
		}
	}
	return runs
}
