package spool

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"sync"

	"trainerd/internal/crashpoint"
	"trainerd/internal/fault"
)

// Record is one accepted body with the name it was accepted under.
type Record struct {
	Seq  uint64 // from 1, assigned by Append, without gaps
	Kind string // "rollouts", or another kind of job log entry
	Key  string // Idempotency-Key, "" when none was given
	Meta []byte // small JSON that the owner understands; spaces at its end may be lost
	Body []byte // the Arrow bytes as received
}

// Log is an open spool. Its methods may be called from many goroutines.
type Log struct {
	disk    disk
	limit   int64        // of a segment, past which the next one is begun
	writing sync.Mutex   // held by the append that writes for all that wait
	mu      sync.RWMutex // guards what follows
	waiting []*appending
	closed  bool
	segs    []segment // ascending; the last one is written to
	last    uint64

	// Of the last segment; guarded by writing.
	active file
	frames frameWriter
	salt   uint64
	dirty  bool // bytes of a failed append may lie past its end
	padded bool // the disk may hold a longer one than its frames, for what fills their last block up
	cut    int64

	beforeSync func() // see BeforeSync
}

// segment is a file of the log.
type segment struct {
	name  string
	first uint64 // record it begins with
	end   int64  // of its whole frames; of the last segment only
}

// appending is a record on its way to the disk.
type appending struct {
	record Record
	done   bool // guarded by Log.writing
	err    error
}

// BeforeSync has f called before each append is synced, by the goroutine that
// holds up all other appends meanwhile: a slow disk, for tests. It is called once,
// before the first Append.
func (l *Log) BeforeSync(f func()) { l.beforeSync = f }

// Open opens or creates the log in dir and cuts a torn tail. Segments roll over at segmentBytes.
func Open(dir string, segmentBytes int64) (*Log, error) {
	d, err := openDisk(dir)
	if err != nil {
		return nil, fmt.Errorf("open spool: %w", err)
	}
	l, err := openOn(d, segmentBytes)
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("open spool %s: %w", dir, err)
	}
	return l, nil
}

func openOn(d disk, segmentBytes int64) (*Log, error) {
	l := &Log{disk: d, limit: segmentBytes}
	names, err := d.Names()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if first, ok := parseName(name); ok {
			l.segs = append(l.segs, segment{name: name, first: first})
		}
	}
	slices.SortFunc(l.segs, func(a, b segment) int { return cmp.Compare(a.first, b.first) })
	unborn, err := l.dropUnborn()
	if err != nil {
		return nil, err
	}
	if len(l.segs) == 0 {
		l.last = max(unborn, 1) - 1
		return l, l.roll()
	}
	s := &l.segs[len(l.segs)-1]
	if l.active, err = d.Open(s.name); err != nil {
		return nil, err
	}
	if err := l.recover(s); err != nil {
		l.active.Close()
		return nil, err
	}
	if unborn > 0 && l.last != unborn-1 { // what came before it was synced
		l.active.Close()
		return nil, corrupt(s.name, s.end, "the segment ends at record %d, expected %d", l.last, unborn-1)
	}
	return l, nil
}

// dropUnborn removes a last segment whose creation did not get as far as a
// synced header: nothing was ever written to it. It returns the record that the
// segment was to begin with, 0 when there was no such segment.
func (l *Log) dropUnborn() (first uint64, err error) {
	if len(l.segs) == 0 {
		return 0, nil
	}
	s := l.segs[len(l.segs)-1]
	f, err := l.disk.Open(s.name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil || size > headerSize {
		return 0, err
	}
	if _, err := readHeader(f, s.name, s.first); err == nil {
		return 0, nil
	}
	l.segs = l.segs[:len(l.segs)-1]
	if err := l.disk.Remove(s.name); err != nil {
		return 0, err
	}
	return s.first, l.disk.Sync()
}

// recover finds the end of the last segment and cuts what is torn.
func (l *Log) recover(s *segment) (err error) {
	if l.salt, err = readHeader(l.active, s.name, s.first); err != nil {
		return err
	}
	size, err := l.active.Size()
	if err != nil {
		return err
	}
	if s.end, l.last, err = recoverTail(l.active, s.name, s.first, size, l.salt); err != nil {
		return err
	}
	if l.cut = size - s.end; l.cut > 0 {
		if err := l.active.Truncate(s.end); err != nil {
			return fmt.Errorf("cut the torn tail of %s: %w", s.name, err)
		}
	}
	// A whole frame may never have been synced, nor the segment's name, if the
	// process that wrote them was killed: they are from here on.
	if err := crashpoint.Sync("spool.recovered", l.active); err != nil {
		return err
	}
	if err := l.frames.begin(l.active, s.end); err != nil {
		return err
	}
	return crashpoint.Sync("spool.recovered_name", l.disk)
}

// roll begins the next segment.
func (l *Log) roll() error {
	if l.active != nil { // only the last segment may be longer than its frames
		if err := l.level(); err != nil {
			return fmt.Errorf("end a segment: %w", err)
		}
	}
	s := segment{name: segmentName(l.last + 1), first: l.last + 1, end: headerSize}
	f, err := l.disk.Create(s.name)
	if errors.Is(err, fs.ErrExist) { // left by a roll that failed and could not be undone
		if err = l.disk.Remove(s.name); err == nil {
			f, err = l.disk.Create(s.name)
		}
	}
	if err != nil {
		return fmt.Errorf("create segment %s: %w", s.name, err)
	}
	salt := rand.Uint64()
	_, err = f.WriteAt(encodeHeader(s.first, salt), 0)
	crashpoint.Reach("spool.new_segment")
	if err == nil {
		err = crashpoint.Sync("spool.header", f)
	}
	if err == nil {
		err = crashpoint.Sync("spool.segment_name", l.disk)
	}
	if err == nil {
		err = l.frames.begin(f, headerSize)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("create segment %s: %w", s.name, err), f.Close(), l.disk.Remove(s.name))
	}
	if l.active != nil {
		err = l.active.Close() // everything in it is synced
	}
	l.mu.Lock()
	l.active, l.salt = f, salt
	l.segs = append(l.segs, s)
	l.mu.Unlock()
	return err
}

// level cuts what the last segment has behind its frames, durably.
func (l *Log) level() error {
	if !l.padded {
		return nil
	}
	if err := l.active.Truncate(l.segs[len(l.segs)-1].end); err != nil {
		return err
	}
	if err := crashpoint.Sync("spool.ended", l.active); err != nil {
		return err
	}
	l.padded = false
	return nil
}

// Append writes the record and returns its sequence number once it is fsynced.
// Concurrent appends share an fsync. After an error of the disk the log is
// whole as before the call and Append may be tried again.
//
// (If the process dies before what a failed append wrote could be cut, the
// record may be there after all: the Key tells the owner.)
func (l *Log) Append(r Record) (uint64, error) {
	if len(r.Kind) > maxKey || len(r.Key) > maxKey || int64(len(r.Body)) > maxRecord || len(r.Meta) > maxRecord>>12 {
		return 0, fault.New(fault.TooLarge, "record_too_large", "append to spool: kind, key, meta or body is too long (%d, %d, %d, %d bytes)",
			len(r.Kind), len(r.Key), len(r.Meta), len(r.Body))
	}
	a := &appending{record: r}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return 0, fault.New(fault.Unavailable, "spool_closed", "append to spool: it is closed")
	}
	l.waiting = append(l.waiting, a)
	l.mu.Unlock()

	l.writing.Lock()
	defer l.writing.Unlock()
	for !a.done { // else another append has written it
		group := l.group()
		err := l.write(group)
		for _, g := range group {
			g.done, g.err = true, err
		}
	}
	if a.err != nil {
		return 0, fault.New(fault.Unavailable, "spool_write", "append to spool: %w", a.err)
	}
	return a.record.Seq, nil
}

// group takes records that wait, in order, up to about groupTarget bytes.
func (l *Log) group() []*appending {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, size := 0, 0
	for n < len(l.waiting) && (n == 0 || size+len(l.waiting[n].record.Body) <= groupTarget) {
		size += len(l.waiting[n].record.Body)
		n++
	}
	group := slices.Clone(l.waiting[:n])
	l.waiting = slices.Delete(l.waiting, 0, n)
	return group
}

// write puts a group on the disk as one frame.
func (l *Log) write(group []*appending) error {
	defer crashpoint.Enter(crashpoint.Append)()
	s := l.segs[len(l.segs)-1] // only write and roll change it, under writing
	if l.dirty {
		if err := l.restore(s); err != nil {
			return err
		}
	}
	if s.end >= l.limit && s.end > headerSize {
		if err := l.roll(); err != nil {
			return err
		}
		s = l.segs[len(l.segs)-1]
	}
	h := frame{count: uint32(len(group)), first: l.last + 1}
	l.padded = l.padded || l.frames.block > 1
	err := l.frames.write(&h, group, l.salt, s.end)
	crashpoint.Reach("spool.frame_written")
	if l.beforeSync != nil {
		l.beforeSync()
	}
	if err == nil {
		err = crashpoint.Sync("spool.frame", l.active)
	}
	crashpoint.Reach("spool.frame_synced")
	if err != nil {
		err = fmt.Errorf("write segment %s: %w", s.name, err)
		l.dirty = true
		return errors.Join(err, l.restore(s))
	}
	l.frames.done()
	l.mu.Lock()
	l.segs[len(l.segs)-1].end = s.end + frameSize + h.length
	l.last = h.last()
	l.mu.Unlock()
	return nil
}

// restore cuts what a failed append left.
func (l *Log) restore(s segment) error {
	err := l.active.Truncate(s.end)
	if err == nil {
		err = l.active.Sync()
	}
	if err != nil {
		return fmt.Errorf("restore the length of %s: %w", s.name, err)
	}
	l.dirty = false
	return nil
}

// Read calls f for each record from seq on, in order, until f returns an error.
// It reads what was appended before the call. The record's bytes are f's to
// keep. Records that were trimmed away are a NotFound fault.
func (l *Log) Read(from uint64, f func(Record) error) error {
	l.mu.RLock()
	segs, last := slices.Clone(l.segs), l.last
	l.mu.RUnlock()
	from = max(from, 1)
	if from > last {
		return nil
	}
	if from < segs[0].first {
		return trimmed(from)
	}
	for i, s := range segs {
		end := last
		if i+1 < len(segs) {
			end = segs[i+1].first - 1
		}
		if end < from || end < s.first {
			continue
		}
		if err := l.readSegment(s, i+1 == len(segs), end, from, f); err != nil {
			return err
		}
	}
	return nil
}

func trimmed(seq uint64) error {
	return fault.New(fault.NotFound, "spool_trimmed", "read spool: record %d was trimmed away", seq)
}

// readSegment reads the records from seq to end of a segment that holds the latter.
func (l *Log) readSegment(s segment, active bool, end, seq uint64, f func(Record) error) error {
	in, err := l.disk.Open(s.name)
	if errors.Is(err, fs.ErrNotExist) {
		return trimmed(max(seq, s.first))
	}
	if err != nil {
		return fmt.Errorf("read spool: %w", err)
	}
	defer in.Close() // was only read
	salt, err := readHeader(in, s.name, s.first)
	if err != nil {
		return err
	}
	size := s.end
	if !active {
		if size, err = in.Size(); err != nil {
			return fmt.Errorf("read spool: %w", err)
		}
	}
	at, next := int64(headerSize), s.first
	for next <= end {
		h, err := frameAt(in, at, size, salt)
		switch {
		case errors.Is(err, errTorn):
			return corrupt(s.name, at, "a damaged frame")
		case errors.Is(err, io.EOF):
			return corrupt(s.name, at, "the segment ends before record %d", next)
		case err != nil:
			return fault.New(fault.Internal, "spool_read", "read spool segment %s at offset %d: %w", s.name, at, err)
		case h.first != next || h.last() > end:
			return corrupt(s.name, at, "a frame of records %d to %d, expected %d to %d at most", h.first, h.last(), next, end)
		}
		if h.last() >= seq {
			if err := readFrame(in, s.name, at, h, seq, f); err != nil {
				return err
			}
		}
		at += frameSize + h.length
		next = h.last() + 1
	}
	if !active && at != size {
		return corrupt(s.name, at, "%d bytes after the last record", size-at)
	}
	return nil
}

// Last returns the newest sequence number, 0 when the log is empty.
func (l *Log) Last() uint64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.last
}

// First returns the oldest sequence number that Read can begin at, Last()+1 when there is none.
func (l *Log) First() uint64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.segs[0].first
}

// Cut is the number of bytes that Open cut from a torn tail.
func (l *Log) Cut() int64 { return l.cut }

// Trim may delete whole segments whose records are all at or before seq.
func (l *Log) Trim(seq uint64) error {
	l.writing.Lock() // no roll meanwhile
	defer l.writing.Unlock()
	for {
		l.mu.Lock()
		if l.closed || len(l.segs) < 2 || l.segs[1].first-1 > seq {
			l.mu.Unlock()
			return nil
		}
		s := l.segs[0]
		l.segs = slices.Clone(l.segs[1:])
		l.mu.Unlock()
		// Oldest first and each durably, so that a crash leaves no gap.
		if err := l.disk.Remove(s.name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("trim spool: %w", err)
		}
		crashpoint.Reach("trim.removed")
		if err := l.disk.Sync(); err != nil {
			return fmt.Errorf("trim spool: %w", err)
		}
	}
}

// Close waits for appends under way and closes the files.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	l.mu.Unlock()
	for {
		l.writing.Lock()
		l.mu.RLock()
		left := len(l.waiting)
		l.mu.RUnlock()
		if left == 0 {
			break
		}
		l.writing.Unlock() // those who wait write it
	}
	defer l.writing.Unlock()
	return errors.Join(l.level(), l.active.Close(), l.disk.Close())
}
