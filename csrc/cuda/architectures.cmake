# What "all" architectures are to an nvcc of a version, into `result`; empty where it is older than the kernels need.
# PTX of 80 serves every later card; that of 120, the newest, those from 12.0 on.
function(pyattr_cuda_architectures version result)
  set(found "")
  if(version VERSION_GREATER_EQUAL 12.8)
    set(found 80 86-real 89-real 90a-real 120)
  elseif(version VERSION_GREATER_EQUAL 12.0)
    set(found 80 86-real 89-real 90a-real)
  endif()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()
