package kernels

// Pinner is a Device that copies to host memory faster once it knows it: the card
// then writes there itself, where its bytes would otherwise pass through memory of the device's own.
type Pinner interface {
	// Pin makes host memory known that starts at a page: later downloads into it
	// are faster, and give the same bytes. It lasts until unpin or the device's Close;
	// the memory must stay where it is until one of them has returned. unpin may be called from
	// any goroutine, also after Close and again, and waits for operations before it. After an error
	// the memory may be used as before.
	Pin(host []byte) (unpin func(), err error)
}
