package cpu

import (
	"cmp"
	"slices"

	"trainerd/kernels"
	"trainerd/kernels/internal/seal"
)

const (
	// tileRows is about how many query rows (tokens × query heads of one key
	// head) are stacked into one matrix: the M of attention's small Gemms.
	tileRows = 192
	// tileParts is the most segments whose queries share a tile; it keeps
	// decoding of many sequences spread over tiles.
	tileParts = 16
	// keyBlock is the most key rows of one block of the backward pass.
	keyBlock = 128
)

// layout is a micro-batch's segments with the schedules made from them, which
// live on the Go heap: a few dozen bytes for every 64 tokens.
type layout struct {
	seal.Mark
	segments []kernels.Segment
	tilings  map[int]*tiling // by query heads per key head
}

func (l *layout) Segments() []kernels.Segment { return l.segments }

func (d *device) Layout(_ kernels.Arena, segments []kernels.Segment) kernels.Layout {
	const op = "layout"
	for i, s := range segments {
		must(s.Q >= 0 && s.QLen >= 0 && s.K >= 0 && s.KLen >= 0 && s.Prefix >= 0 && s.PrefixLen >= 0, op, "segment %d is %+v, expected nothing negative", i, s)
	}
	return &layout{segments: slices.Clone(segments), tilings: map[int]*tiling{}}
}

func (d *device) LayoutScratch(segments, t int) int64 { return 0 }

// part is a run of query rows of one segment within a tile.
type part struct {
	q, n int // rows of the query matrix
	at   int // tokens of the tile before it
	k    int // first own key row
	seen int // own keys that its first query sees; may be negative. Each next one sees one more
}

// keys returns how many own keys the last query of the part sees.
func (p part) keys() int { return max(0, p.seen+p.n-1) }

// blind returns how many queries at the start of the part see none of the own keys from the given one on.
func (p part) blind(key int) int { return max(0, key+1-p.seen) }

// tile is a set of queries that share one fully visible prefix.
type tile struct {
	prefix, prefixLen int
	at, tokens        int // first token in the order of all tiles, and number
	parts             []part
}

// tiling is the schedule of a layout for one grouping of heads.
type tiling struct {
	tiles  []tile
	tokens int // of all tiles
	order  []int
	strips map[int][]strip // backward schedules by number of strips
}

// tile cuts a layout's queries for group query heads per key head.
func (l *layout) tile(group int) *tiling {
	if t := l.tilings[group]; t != nil {
		return t
	}
	most := max(1, tileRows/group)
	t := &tiling{strips: map[int][]strip{}}
	for _, s := range l.segments {
		// A long segment is cut evenly; short ones with one prefix are merged.
		pieces := (int(s.QLen) + most - 1) / most
		for c := range pieces {
			from, to := c*int(s.QLen)/pieces, (c+1)*int(s.QLen)/pieces
			p := part{q: int(s.Q) + from, n: to - from, k: int(s.K), seen: from + 1 + int(s.KLen-s.QLen)}
			if n := len(t.tiles); n > 0 {
				last := &t.tiles[n-1]
				if s.PrefixLen > 0 && last.prefix == int(s.Prefix) && last.prefixLen == int(s.PrefixLen) &&
					last.tokens+p.n <= most && len(last.parts) < tileParts {
					p.at = last.tokens
					last.parts = append(last.parts, p)
					last.tokens += p.n
					t.tokens += p.n
					continue
				}
			}
			t.tiles = append(t.tiles, tile{prefix: int(s.Prefix), prefixLen: int(s.PrefixLen), at: t.tokens, tokens: p.n, parts: []part{p}})
			t.tokens += p.n
		}
	}
	// The dearest first, so that the last task of a run is a small one.
	cost := make([]int, len(t.tiles))
	for i, x := range t.tiles {
		cost[i] = x.tokens * x.prefixLen
		for _, p := range x.parts {
			cost[i] += p.n * p.keys()
		}
		t.order = append(t.order, i)
	}
	slices.SortStableFunc(t.order, func(a, b int) int { return cmp.Compare(cost[b], cost[a]) })
	l.tilings[group] = t
	return t
}

// strip is a set of key blocks, by tile: everything one backward task handles.
type strip struct {
	visits [][]visit // for each tile; empty where the tile sees none of the strip's keys
	cost   int
}

// visit is one key block as seen by a tile: as its prefix (part -1), or as own
// keys of one of its parts.
type visit struct {
	key, n int // key rows
	part   int
	own    int // index of the block's first key among the part's own keys
}

// cut splits the key rows into n strips of about equal work.
func (t *tiling) cut(n int, segments []kernels.Segment) []strip {
	if s := t.strips[n]; s != nil {
		return s
	}
	strips := make([]strip, n)
	for i := range strips {
		strips[i].visits = make([][]visit, len(t.tiles))
	}
	blocks := keyBlocks(segments)
	cost := make([]int, len(blocks))
	seen := make([][]visit, len(blocks)*len(t.tiles))
	for b, block := range blocks {
		for i, x := range t.tiles {
			v := x.visits(block[0], block[1])
			for _, w := range v {
				if w.part < 0 {
					cost[b] += w.n * x.tokens
				} else {
					cost[b] += w.n * x.parts[w.part].n
				}
			}
			seen[b*len(t.tiles)+i] = v
		}
	}
	// Longest first onto the least loaded.
	order := make([]int, len(blocks))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(cost[b], cost[a]) })
	for _, b := range order {
		least := 0
		for i := range strips {
			if strips[i].cost < strips[least].cost {
				least = i
			}
		}
		strips[least].cost += cost[b]
		for i := range t.tiles {
			strips[least].visits[i] = append(strips[least].visits[i], seen[b*len(t.tiles)+i]...)
		}
	}
	t.strips[n] = strips
	return strips
}

// keyBlocks cuts the key rows in use at every edge of a segment's keys and
// prefix, and then into at most keyBlock rows: a tile sees a block as prefix
// wholly or not at all.
func keyBlocks(segments []kernels.Segment) [][2]int {
	var edges []int
	for _, s := range segments {
		edges = append(edges, int(s.K), int(s.K+s.KLen), int(s.Prefix), int(s.Prefix+s.PrefixLen))
	}
	slices.Sort(edges)
	edges = slices.Compact(edges)
	var out [][2]int
	for i := 0; i+1 < len(edges); i++ {
		n := edges[i+1] - edges[i]
		pieces := (n + keyBlock - 1) / keyBlock
		for c := range pieces {
			out = append(out, [2]int{edges[i] + c*n/pieces, edges[i] + (c+1)*n/pieces})
		}
	}
	return out
}

// visits lists how the tile sees key rows [from,to).
func (x tile) visits(from, to int) []visit {
	var v []visit
	if from >= x.prefix && to <= x.prefix+x.prefixLen {
		v = append(v, visit{key: from, n: to - from, part: -1})
	}
	for i, p := range x.parts {
		if from >= p.k && from < p.k+p.keys() {
			v = append(v, visit{key: from, n: min(to, p.k+p.keys()) - from, part: i, own: from - p.k})
		}
	}
	return v
}
