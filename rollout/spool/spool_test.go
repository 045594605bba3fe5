package spool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"trainerd/internal/fault"
)

func seeded(t *testing.T) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// numbered is a record whose content follows from its number.
func numbered(n uint64) Record {
	return Record{Seq: n, Kind: "rollouts", Key: fmt.Sprint("key-", n), Meta: []byte(fmt.Sprintf(`{"n":%d}`, n)), Body: bytes.Repeat([]byte{byte(n)}, int(n%40))}
}

func mustOpen(t *testing.T, dir string, segmentBytes int64) *Log {
	t.Helper()
	l, err := Open(dir, segmentBytes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func mustAppend(t *testing.T, l *Log, from, to uint64) {
	t.Helper()
	for n := from; n <= to; n++ {
		if seq, err := l.Append(numbered(n)); err != nil || seq != n {
			t.Fatal(seq, err)
		}
	}
}

func readAll(l *Log, from uint64) (out []Record, err error) {
	err = l.Read(from, func(r Record) error { out = append(out, r); return nil })
	return out, err
}

// holds checks that the log has exactly the numbered records from..to.
func holds(t *testing.T, l *Log, from, to uint64) {
	t.Helper()
	var want []Record
	for n := from; n <= to; n++ {
		want = append(want, numbered(n))
	}
	got, err := readAll(l, from)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" || l.Last() != to {
		t.Fatal(diff, l.Last(), to)
	}
}

func segments(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.seg"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestAppendReadReopen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "spool")
	for _, limit := range []int64{1, 200, 1 << 20} {
		dir := filepath.Join(dir, fmt.Sprint(limit))
		l := mustOpen(t, dir, limit)
		if l.Last() != 0 || l.First() != 1 {
			t.Fatal(l.First(), l.Last())
		}
		holds(t, l, 1, 0)
		mustAppend(t, l, 1, 30)
		holds(t, l, 1, 30)
		holds(t, l, 17, 30)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Append(Record{}); fault.KindOf(err) != fault.Unavailable {
			t.Fatal(err)
		}
		l = mustOpen(t, dir, limit)
		holds(t, l, 1, 30)
		mustAppend(t, l, 31, 40)
		holds(t, l, 1, 40)
		if got, err := readAll(l, 99); got != nil || err != nil {
			t.Fatal(got, err)
		}
		stop := errors.New("stop")
		n := 0
		if err := l.Read(1, func(Record) error { n++; return stop }); err != stop || n != 1 {
			t.Fatal(err, n)
		}
		if n := len(segments(t, dir)); limit == 1 && n != 40 || limit == 1<<20 && n != 1 {
			t.Fatal(limit, n)
		}
	}
}

func TestOneProcessAtATime(t *testing.T) {
	dir := t.TempDir()
	mustOpen(t, dir, 1<<20)
	if _, err := Open(dir, 1<<20); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Fatal(err)
	}
}

func TestTrim(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, dir, 300)
	mustAppend(t, l, 1, 50)
	for _, seq := range []uint64{0, 10, 10, 30} {
		if err := l.Trim(seq); err != nil {
			t.Fatal(err)
		}
		if l.First() > seq+1 {
			t.Fatalf("trim(%d) removed up to record %d", seq, l.First()-1)
		}
	}
	first := l.First()
	if first < 20 {
		t.Fatal("little was trimmed", first)
	}
	holds(t, l, first, 50)
	if _, err := readAll(l, first-1); fault.KindOf(err) != fault.NotFound {
		t.Fatal(err)
	}
	if err := l.Trim(1000); err != nil { // the last segment stays: the numbers go on
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = mustOpen(t, dir, 300)
	mustAppend(t, l, 51, 52)
	holds(t, l, l.First(), 52)
}

// copyDir copies a closed log.
func copyDir(t *testing.T, from string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	return to
}

// A log cut at any byte of its last frame opens with the records before it, and goes on.
func TestTornTailIsCutAtEveryByte(t *testing.T) {
	d := newMemDisk()
	l, err := openOn(d, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	mustAppend(t, l, 1, 7)
	before := l.segs[0].end
	mustAppend(t, l, 8, 8)
	whole := d.files[segmentName(1)].now
	for size := before; size < int64(len(whole)); size++ {
		for _, tail := range []string{"cut", "zeros", "noise"} {
			data := slices.Clone(whole)
			switch tail {
			case "cut":
				data = data[:size]
			case "zeros":
				clear(data[size:])
			case "noise":
				for i := size; i < int64(len(data)); i++ {
					data[i] ^= byte(i*7 + 1)
				}
			}
			if bytes.Equal(data, whole) {
				continue // the frame ends in zeros
			}
			d := newMemDisk()
			d.files[segmentName(1)] = &memFile{d: d, now: data}
			l, err := openOn(d, 1<<20)
			if err != nil {
				t.Fatal(tail, size, err)
			}
			if want := int64(len(data)) - before; l.Cut() != want {
				t.Fatalf("%s at %d: cut %d, want %d", tail, size, l.Cut(), want)
			}
			mustAppend(t, l, 8, 9)
			holds(t, l, 1, 9)
		}
	}
}

// with returns a copy of the disk on which a file holds data.
func (d *memDisk) with(name string, data []byte) *memDisk {
	c := newMemDisk()
	for n, f := range d.files {
		c.files[n] = &memFile{d: c, now: slices.Clone(f.now)}
	}
	c.files[name] = &memFile{d: c, now: slices.Clone(data)}
	return c
}

// A log whose creation of a segment was cut anywhere goes on with the same number.
func TestTornHeader(t *testing.T) {
	d := newMemDisk()
	l, err := openOn(d, 1)
	if err != nil {
		t.Fatal(err)
	}
	mustAppend(t, l, 1, 3)
	for size := range headerSize {
		for _, b := range [][]byte{encodeHeader(4, 9)[:size], make([]byte, size), make([]byte, headerSize)} {
			l, err := openOn(d.with(segmentName(4), b), 1)
			if err != nil {
				t.Fatal(err)
			}
			mustAppend(t, l, 4, 5)
			holds(t, l, 1, 5)
		}
	}
	// What stands before an unborn segment was synced: damage there is no torn tail.
	damaged := slices.Clone(d.files[segmentName(3)].now)
	damaged[len(damaged)-1] ^= 1
	if _, err := openOn(d.with(segmentName(3), damaged).with(segmentName(4), nil), 1); err == nil || !strings.Contains(err.Error(), segmentName(3)) {
		t.Fatal(err)
	}
}

// A flipped byte before the last frame is found and named; it is never cut.
func TestCorruptionIsAnErrorThatNamesFileAndOffset(t *testing.T) {
	d := newMemDisk()
	l, err := openOn(d, 400)
	if err != nil {
		t.Fatal(err)
	}
	mustAppend(t, l, 1, 14)
	if len(l.segs) < 2 || l.segs[len(l.segs)-1].first == 14 {
		t.Fatal("expected several segments and several frames in the last", l.segs)
	}
	for k, s := range l.segs {
		data := d.files[s.name].now
		var frames []int64 // where frames begin
		salt := binary.LittleEndian.Uint64(data[20:])
		for at := int64(headerSize); at < int64(len(data)); {
			frames = append(frames, at)
			h, ok := decodeFrame(data[at:], salt)
			if !ok {
				t.Fatal("no frame", s.name, at)
			}
			at += frameSize + h.length
		}
		for at := range data {
			if k == len(l.segs)-1 && int64(at) >= frames[len(frames)-1] {
				break // may be a torn tail
			}
			flipped := slices.Clone(data)
			flipped[at] ^= 0x10
			damaged, err := openOn(d.with(s.name, flipped), 400)
			if err == nil {
				_, err = readAll(damaged, 1)
			}
			offset := 0
			for _, f := range frames {
				if int64(at) >= f {
					offset = int(f)
				}
			}
			if err == nil || !strings.Contains(err.Error(), s.name) || !strings.Contains(err.Error(), fmt.Sprintf("offset %d:", offset)) {
				t.Fatalf("byte %d of %s: %v, want offset %d", at, s.name, err, offset)
			}
		}
	}
	first := l.segs[0].name
	t.Run("missing segment", func(t *testing.T) {
		d := d.with(first, d.files[first].now)
		delete(d.files, l.segs[1].name)
		l, err := openOn(d, 400)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := readAll(l, 1); err == nil || !strings.Contains(err.Error(), first) {
			t.Fatal(err)
		}
	})
	t.Run("cut in an earlier segment", func(t *testing.T) {
		l, err := openOn(d.with(first, d.files[first].now[:150]), 400)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := readAll(l, 1); err == nil || !strings.Contains(err.Error(), first) {
			t.Fatal(err)
		}
	})
}

// Bytes that look like a frame but carry another salt do not hide a torn tail.
func TestBodiesDoNotPassForFrames(t *testing.T) {
	d := newMemDisk()
	l, err := openOn(d, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	inner := slices.Clone(d.files[segmentName(1)].now)
	other, err := openOn(newMemDisk(), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Append(numbered(30)); err != nil {
		t.Fatal(err)
	}
	inner = append(inner, other.disk.(*memDisk).files[segmentName(1)].now...)
	if _, err := l.Append(Record{Body: inner}); err != nil {
		t.Fatal(err)
	}
	f := d.files[segmentName(1)]
	f.now = f.now[:len(f.now)-1]
	again, err := openOn(d, 1<<20)
	if err != nil || again.Last() != 0 {
		t.Fatal(err)
	}
}

// A full disk and failing calls leave the log as it was, and it can be tried again.
func TestAppendAfterAnErrorOfTheDisk(t *testing.T) {
	for _, segmentBytes := range []int64{1, 1 << 20} {
		for room := range 200 {
			d := newMemDisk()
			l, err := openOn(d, segmentBytes)
			if err != nil {
				t.Fatal(err)
			}
			mustAppend(t, l, 1, 2)
			d.room = room
			seq, err := l.Append(numbered(3))
			d.room = -1
			if err == nil {
				if seq != 3 {
					t.Fatal(seq)
				}
				continue
			}
			if fault.KindOf(err) != fault.Unavailable || !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
			holds(t, l, 1, 2)
			if after, err := openOn(d, segmentBytes); err != nil || after.Cut() != 0 || after.Last() != 2 {
				t.Fatal("a failed append left bytes behind", err)
			}
			mustAppend(t, l, 3, 5)
			holds(t, l, 1, 5)
			again, err := openOn(d, segmentBytes)
			if err != nil || again.Cut() != 0 {
				t.Fatal(err, again.Cut())
			}
			holds(t, again, 1, 5)
		}
	}
	for _, op := range []string{"write", "sync", "truncate", "create", "syncdir", "remove"} {
		d := newMemDisk()
		l, err := openOn(d, 1)
		if err != nil {
			t.Fatal(err)
		}
		mustAppend(t, l, 1, 2)
		d.fail = func(got string) error {
			if got == op || op != "write" && got == "sync" { // so that truncate and remove are reached
				return errDisk
			}
			return nil
		}
		for range 3 {
			if _, err := l.Append(numbered(3)); !errors.Is(err, errDisk) {
				t.Fatal(op, err)
			}
		}
		holds(t, l, 1, 2)
		d.fail = func(string) error { return nil }
		mustAppend(t, l, 3, 4)
		holds(t, l, 1, 4)
	}
}

// What is written in blocks reads as what is written byte by byte, wherever records
// end in a block or in what is written at once, and whatever failed in between.
func TestFramesInBlocks(t *testing.T) {
	r := seeded(t)
	noise := blocks(3 * mostStaged) // bodies are written from where they are
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	for i := range 32 {
		d := newMemDisk()
		d.block = []int64{1, 64, 512, directBlock}[i%4]
		limit := int64(1 + r.IntN(4*mostStaged))
		l, err := openOn(d, limit)
		if err != nil {
			t.Fatal(err)
		}
		var want []Record
		for range 12 {
			near := []int{0, 100, 4096, 8192, leastStaged, mostStaged, 2 * mostStaged}[r.IntN(7)] - headerSize - frameSize - recordSize
			x := Record{Kind: "k", Body: noise[:max(0, near+r.IntN(9)-5)], Meta: []byte("{}")[:2*r.IntN(2)]}
			if r.IntN(3) == 0 {
				x.Body = noise[1:max(1, len(x.Body))] // or cannot be
			}
			if r.IntN(2) == 0 { // the segment ends just there: at a block's end, or a few bytes from it
				end := l.segs[len(l.segs)-1].end
				x.Body = noise[:up(end+frameSize+recordSize+100, directBlock)-end-frameSize-recordSize-1-int64(r.IntN(3))]
			}
			if r.IntN(4) == 0 {
				left := r.IntN(3)
				d.fail = func(op string) error {
					if left--; left < 0 && (op == "sync" || op == "write") {
						return errDisk
					}
					return nil
				}
				other := noise[[]int{0, 1000}[r.IntN(2)]:][:r.IntN(2*mostStaged)]
				if _, err := l.Append(Record{Kind: "other", Meta: []byte("{}"), Body: other}); err == nil {
					t.Fatal("a broken disk took a record")
				}
				d.fail = func(string) error { return nil }
				// Had the power gone instead, all that was answered would be there, and
				// the record under way whole or not at all.
				after, err := openOn(d.crash(r), limit)
				if err != nil {
					t.Fatal(err)
				}
				there, err := readAll(after, 1)
				if err != nil || len(there) < len(want) || len(there) > len(want)+1 {
					t.Fatalf("after a power cut: %d records of %d, %v", len(there), len(want), err)
				}
				for k, x := range there {
					if k < len(want) && !bytes.Equal(x.Body, want[k].Body) || k == len(want) && !bytes.Equal(x.Body, other) {
						t.Fatalf("after a power cut: record %d is another", x.Seq)
					}
				}
			}
			seq, err := l.Append(x)
			if err != nil {
				t.Fatal(err)
			}
			x.Seq = seq
			want = append(want, x)
			if r.IntN(5) == 0 { // by a process that was killed, or one that was not
				if r.IntN(2) == 0 {
					if err := l.Close(); err != nil {
						t.Fatal(err)
					}
				}
				if l, err = openOn(d, limit); err != nil {
					t.Fatal(err)
				}
			}
		}
		got, err := readAll(l, 1)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != len(want) {
			t.Fatalf("%d records, expected %d", len(got), len(want))
		}
		for k := range got {
			if got[k].Seq != want[k].Seq || !bytes.Equal(got[k].Body, want[k].Body) || got[k].Kind != want[k].Kind || !bytes.Equal(got[k].Meta, want[k].Meta) {
				t.Fatalf("blocks of %d: record %d of %d bytes came back as %d of %d", d.block, want[k].Seq, len(want[k].Body), got[k].Seq, len(got[k].Body))
			}
		}
		var together sync.WaitGroup // several in a frame
		for k := range 6 {
			together.Go(func() {
				if _, err := l.Append(Record{Kind: "k", Meta: []byte("{}"), Body: noise[:leastInPlace+k*777]}); err != nil {
					t.Error(err)
				}
			})
		}
		together.Wait()
		sizes := map[int]int{}
		if err := l.Read(uint64(len(want)+1), func(x Record) error {
			sizes[len(x.Body)]++
			if !bytes.Equal(x.Body, noise[:len(x.Body)]) || string(x.Meta) != "{}" {
				return fmt.Errorf("record %d of %d bytes, meta %q, came back otherwise", x.Seq, len(x.Body), x.Meta)
			}
			return nil
		}); err != nil || len(sizes) != 6 {
			t.Fatal(err, sizes)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if again, err := openOn(d, limit); err != nil || again.Cut() != 0 {
			t.Fatalf("a log that was closed: %v, %d bytes cut", err, again.Cut())
		}
	}
}

// refusing is a file opened for direct writes that refuses them.
type refusing struct {
	err    error
	writes int
	closed bool
}

func (f *refusing) WriteAt([]byte, int64) (int, error) { f.writes++; return 0, f.err }
func (f *refusing) Close() error                       { f.closed = true; return nil }

// A file that takes no direct writes after all is written as everybody does; what
// else is wrong with it is an error.
func TestDirectWritesAreRefused(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, dir, 1<<20)
	f := l.active.(*osFile)
	if f.direct != nil {
		if err := f.direct.Close(); err != nil {
			t.Fatal(err)
		}
	}
	l.frames.block = directBlock
	broken := &refusing{err: syscall.EIO}
	f.direct = broken
	if _, err := l.Append(numbered(1)); !errors.Is(err, syscall.EIO) || broken.closed {
		t.Fatal(err, broken)
	}
	refuses := &refusing{err: syscall.EINVAL}
	f.direct = refuses
	mustAppend(t, l, 1, 9)
	if refuses.writes != 1 || !refuses.closed {
		t.Fatal(refuses)
	}
	holds(t, l, 1, 9)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = mustOpen(t, dir, 1<<20)
	if l.Cut() != 0 {
		t.Fatal(l.Cut(), "bytes cut")
	}
	mustAppend(t, l, 10, 30)
	holds(t, l, 1, 30)
}

// A machine that loses power at any moment keeps every record whose Append
// returned, in order, and never one that was not sent.
func TestPowerCuts(t *testing.T) {
	r := seeded(t)
	for i := range 200 {
		d := newMemDisk()
		d.block = []int64{1, 64, 512, directBlock}[i%4]
		l, err := openOn(d, int64(1+r.IntN(400)))
		if err != nil {
			t.Fatal(err)
		}
		acked, sent, trimmedTo := uint64(0), uint64(0), uint64(0)
		for range 4 { // lives
			calls, dies := 0, 1+r.IntN(60)
			d.fail = func(string) error {
				if calls++; calls >= dies {
					return errDisk // nothing more reaches the disk in this life
				}
				return nil
			}
			for {
				sent = acked + 1
				seq, err := l.Append(numbered(sent))
				if err != nil {
					break
				}
				if seq != sent {
					t.Fatal(seq, sent)
				}
				acked = seq
				if r.IntN(8) == 0 {
					trimmedTo = max(trimmedTo, acked/2)
					if l.Trim(acked/2) != nil {
						break
					}
				}
			}
			d = d.crash(r)
			if l, err = openOn(d, int64(1+r.IntN(400))); err != nil {
				t.Fatal(err)
			}
			// What was under way at the crash may have arrived.
			if l.Last() != acked && l.Last() != sent {
				t.Fatalf("last is %d, acknowledged %d, sent %d", l.Last(), acked, sent)
			}
			if l.First() > trimmedTo+1 {
				t.Fatalf("first is %d, trimmed to %d", l.First(), trimmedTo)
			}
			acked = l.Last()
			holds(t, l, l.First(), acked)
		}
	}
}

// testdata/v1 was written once by TestGolden with TRAINERD_WRITE_GOLDEN=1 into an
// absent folder; it is read for ever.
func TestGolden(t *testing.T) {
	const golden = "testdata/v1"
	if _, err := os.Stat(golden); os.IsNotExist(err) && os.Getenv("TRAINERD_WRITE_GOLDEN") != "" {
		l := mustOpen(t, golden, 500)
		mustAppend(t, l, 1, 20)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(golden, lockName)); err != nil {
			t.Fatal(err)
		}
	}
	l := mustOpen(t, copyDir(t, golden), 500)
	holds(t, l, 1, 20)
	if len(l.segs) < 2 {
		t.Fatal("the golden has one segment")
	}
	mustAppend(t, l, 21, 22)
	holds(t, l, 1, 22)
}

// Whatever a directory holds, Open and Read answer with records or an error.
func FuzzOpen(f *testing.F) {
	d := newMemDisk()
	l, err := openOn(d, 1<<20)
	if err != nil {
		f.Fatal(err)
	}
	for n := range uint64(4) {
		if _, err := l.Append(numbered(n + 1)); err != nil {
			f.Fatal(err)
		}
	}
	valid := d.files[segmentName(1)].now
	f.Add(valid)
	f.Add(valid[:len(valid)-3])
	f.Add(valid[:headerSize])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		d := newMemDisk()
		d.files[segmentName(1)] = &memFile{d: d, now: data}
		l, err := openOn(d, 1<<20)
		if err != nil {
			return
		}
		n := uint64(0)
		if err := l.Read(1, func(Record) error { n++; return nil }); err == nil && n != l.Last() {
			t.Fatalf("read %d records of %d", n, l.Last())
		}
		if _, err := l.Append(numbered(1)); err != nil {
			t.Fatal(err)
		}
	})
}
