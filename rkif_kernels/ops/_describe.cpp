// The addresses and properties ("kinds") of a list of tensors, read through DLPack's C exchange API.
//
// A training step needs them for every parameter and gradient. With PyTorch's Python API this would take longer than
// the rest of the step's host work. DLPack 1.3 fixes the layout of the structs below for its major version, so this
// file needs none of PyTorch's headers, and works with any PyTorch that has the API.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

struct DLDevice {
    int32_t type, id;
};

struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct DLPackExchangeAPI {
    uint32_t major, minor;
    void* previous;
    void* managed_tensors[3];
    int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
    void* current_work_stream;
};

struct Kind {
    PyTypeObject* type;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
};

static_assert(sizeof(Kind) == 24, "padding bytes would differ between equal kinds");

// The properties of a list of tensors, as bytes; two lists have equal bytes if and only if their properties are equal.
class Kinds {
  public:
    explicit Kinds(Py_ssize_t tensors) : bytes_(64 * tensors) {}

    template <class T>
    void add(const T* values, int64_t count = 1) {
        const size_t size = count * sizeof(T);
        if (used_ + size > bytes_.size()) bytes_.resize(2 * (used_ + size));
        // Copies of a fixed size need no call.
        for (int64_t index = 0; index < count; ++index) {
            std::memcpy(bytes_.data() + used_ + index * sizeof(T), values + index, sizeof(T));
        }
        used_ += size;
    }

    PyObject* object() const { return PyBytes_FromStringAndSize(bytes_.data(), Py_ssize_t(used_)); }

  private:
    std::vector<char> bytes_;
    size_t used_ = 0;
};

// Whether a tensor is a view with a delayed negation: 1 or 0; -1 on an error. DLPack has no field for this.
int is_neg(PyObject* tensor) {
    Py_INCREF(tensor);  // the call releases the GIL, and another thread may change the list
    PyObject* found = PyObject_CallMethod(tensor, "is_neg", nullptr);
    Py_DECREF(tensor);
    const int value = found ? PyObject_IsTrue(found) : -1;
    Py_XDECREF(found);
    return value;
}

// Append a tensor's properties; false, without an exception, if this is not possible.
bool describe_one(const DLPackExchangeAPI* api, PyObject* tensor, int64_t* address, Kinds* kinds) {
    DLTensor view{};
    if (api->dltensor_from_py_object_no_sync(tensor, &view) || (view.ndim && !view.strides)) {
        PyErr_Clear();
        return false;
    }
    *address = int64_t(view.data) + int64_t(view.byte_offset);
    const Kind kind{Py_TYPE(tensor), view.device, view.ndim, view.dtype};
    kinds->add(&kind);
    kinds->add(view.shape, view.ndim);
    kinds->add(view.strides, view.ndim);
    int64_t numel = 1;
    for (int32_t dim = 0; dim < view.ndim; ++dim) numel *= view.shape[dim];
    if (numel == 1) {
        // A tensor whose negation is delayed is an imaginary part, so its elements have gaps, which its strides
        // show. Only a single element has no such gap.
        const int negated = is_neg(tensor);
        if (negated < 0) {
            PyErr_Clear();
            return false;
        }
        kinds->add(&negated);
    }
    return true;
}

bool is_one_of(PyTypeObject* type, PyObject* types) {
    for (Py_ssize_t index = 0; index < PyTuple_GET_SIZE(types); ++index) {
        if (PyTuple_GET_ITEM(types, index) == reinterpret_cast<PyObject*>(type)) return true;
    }
    return false;
}

// describe(tensors, api, types) -> (addresses, kinds), or None if an entry is neither None nor of one of the types, or
// if another thread has changed the list.
PyObject* describe(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 3 || !PyTuple_Check(arguments[2])) {
        PyErr_SetString(PyExc_TypeError, "describe takes a list, a capsule and a tuple of types");
        return nullptr;
    }
    auto api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(arguments[1], "dlpack_exchange_api"));
    if (!api) return nullptr;
    PyObject* tensors = PySequence_Fast(arguments[0], "tensors must be a sequence");
    if (!tensors) return nullptr;
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(tensors);
    PyObject* addresses = PyBytes_FromStringAndSize(nullptr, size * Py_ssize_t(sizeof(int64_t)));
    PyObject* found = nullptr;
    bool possible = api->major == 1 && api->dltensor_from_py_object_no_sync;
    try {
        Kinds kinds(size);
        for (Py_ssize_t index = 0; addresses && possible && index < size; ++index) {
            possible = PySequence_Fast_GET_SIZE(tensors) == size;
            if (!possible) break;
            PyObject* tensor = PySequence_Fast_GET_ITEM(tensors, index);
            int64_t address = 0;
            if (tensor == Py_None) {
                const Kind none{};
                kinds.add(&none);
            } else {
                possible = is_one_of(Py_TYPE(tensor), arguments[2]) && describe_one(api, tensor, &address, &kinds);
            }
            reinterpret_cast<int64_t*>(PyBytes_AS_STRING(addresses))[index] = address;
        }
        if (PyObject* bytes = addresses && possible ? kinds.object() : nullptr) {
            found = PyTuple_Pack(2, addresses, bytes);
            Py_DECREF(bytes);
        }
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    }
    Py_XDECREF(addresses);
    Py_DECREF(tensors);
    if (!found && !PyErr_Occurred()) Py_RETURN_NONE;
    return found;
}

PyMethodDef methods[] = {
    {"describe", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(describe)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_describe", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__describe() { return PyModule_Create(&module); }
